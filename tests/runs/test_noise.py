import numpy as np
import torch
from scipy import stats

from sae_steering_plugin.runs.noise import gumbel, gumbel_noise, noise_key, philox_words


def test_noise_depends_on_the_key_and_the_step_alone():
    keys = [noise_key(1, "a", 0), noise_key(1, "b", 0), noise_key(1, "a", 1)]
    together = gumbel_noise(keys, 50)
    for step in (0, 7):
        for row, key in enumerate(keys):
            assert torch.equal(gumbel_noise([key], 50)(step)[0], together(step)[row])
    assert not torch.equal(together(0), together(1))
    assert not torch.equal(together(0)[0], together(0)[1])
    assert not torch.equal(together(0)[0], together(0)[2])


def test_rows_with_one_key_share_their_noise():
    key = noise_key(3, "a")
    noise = gumbel_noise([key, noise_key(3, "b"), key], 21)(0)
    assert torch.equal(noise[0], noise[2])
    assert noise.shape == (3, 21)


def test_a_smaller_vocabulary_reads_the_same_noise():
    key = noise_key(0, "a")
    assert np.array_equal(philox_words(key, 2, 101)[:60], philox_words(key, 2, 60))


def test_the_noise_is_gumbel_and_independent_across_steps():
    key = noise_key(5, "a")
    drawn = gumbel(np.stack([philox_words(key, step, 1000) for step in range(20)]))
    assert stats.kstest(drawn.ravel(), "gumbel_r").pvalue > 1e-3
    extremes = gumbel(np.array([0, 2**32 - 1], dtype=np.uint32))
    assert np.isfinite(drawn).all() and np.isfinite(extremes).all()
    assert abs(np.corrcoef(drawn[0], drawn[1])[0, 1]) < 0.15


def test_the_largest_noisy_logit_is_a_sample_of_the_softmax():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0], dtype=torch.float64)
    noise = gumbel_noise([noise_key(0, item) for item in range(1000)], 4)
    picked = torch.cat([(logits + noise(step)).argmax(dim=-1) for step in range(3)])
    counts = torch.bincount(picked, minlength=4).numpy()
    assert stats.chisquare(counts, logits.softmax(0).numpy() * 3000).pvalue > 1e-3


def test_parts_of_a_key_do_not_run_together():
    assert noise_key(1, "ab", "c") != noise_key(1, "a", "bc")
    assert noise_key(1, "a", 1) != noise_key(11, "a")
