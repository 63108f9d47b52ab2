"""AxBench's protocol: its files, detection, steering, ratings, and the files its analysis opens.

Source: arXiv 2501.17148, stanfordnlp/axbench at e9b8cd4. Without a language model under AxBench's
own prompts no number made here is an AxBench score, and none is written under its key.
"""
