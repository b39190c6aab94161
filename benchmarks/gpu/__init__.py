"""What this engine does on a GPU, in one command: is it right, how fast is it, and how far from the roofline.

Needs torch, triton, transformers, safetensors and numpy, and nothing that the server needs. See docs/gpu.md.
"""
