"""What a step, and a move of bytes, is expected to cost: fitted to what was measured, at start and while steps run.

`fit(profile)` makes a `CostModel`, which predicts; `OnlineCost` is the one of a running engine. No other part of the
engine estimates times of steps.
"""
