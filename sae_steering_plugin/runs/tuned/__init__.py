"""AxBench's methods, one module per kind; `runs.steering_methods` names them all.

Source: arXiv 2501.17148, section 3 and appendix, and stanfordnlp/axbench at e9b8cd4.
"""
