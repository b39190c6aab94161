"""Ascend NPU: tensors in, tensors out. Imports nothing of the other packages, and without a driver or toolkit."""
