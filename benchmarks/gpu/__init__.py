"""Is gannorm right and fast on this GPU? One command; see docs/gpu.md.

python -m benchmarks.gpu                  # about 12 minutes
python -m benchmarks.gpu --rehearse       # all of it without a GPU, tiny
"""
