import pytest
import torch

from sae_steering_plugin.features.lens import top_tokens


def test_the_lens_holds_the_largest_logits_best_first():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [4.0, 1.0, 1.0, 1.0]])
    lens = top_tokens([5, 9], [logits[:1], logits[1:]], k=3)
    assert lens.tokens.tolist() == [[1, 3, 2], [0, 1, 2]]  # equal logits: the smaller id
    assert lens.logits[0].tolist() == [3.0, 2.0, 1.0]
    assert lens.of([9]).tolist() == [[0, 1, 2]]
    assert lens.k == 3


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"k is 5; it must lie in 1\.\.4"):
        top_tokens([0], [torch.zeros(1, 4)], k=5)
    with pytest.raises(ValueError, match="1 rows of logits for 2 features"):
        top_tokens([0, 1], [torch.zeros(1, 4)], k=2)
    with pytest.raises(KeyError, match="not computed for feature 3"):
        top_tokens([0], [torch.zeros(1, 4)], k=2).of([3])
