"""What is done with runs: evaluation against baselines and controls, learning curves, replays.

Nothing is imported here, so that a part without a model, such as `provenance`, costs no import of torch.
"""
