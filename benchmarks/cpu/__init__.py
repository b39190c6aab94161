"""What developers measure on a CPU: this engine beside those of other houses, and beside another tree of itself.

The users' benchmarks are `xllm bench`; these go on where those end. Nothing of the product imports them.
"""
