"""What the norms and a training step cost, beside torch's own.

    python -m benchmarks.gpu          all that only a GPU can tell, in 12 minutes (docs/gpu.md)
    python -m benchmarks.norms        time and share of the copy bandwidth of every op
    python -m benchmarks.moves        bytes that the kernels move, counted without a GPU
    python -m benchmarks.host         what one call costs the host
    python -m benchmarks.step         a training step, part by part
    python -m benchmarks.profile      where its time goes, by part and operator, beside the floor
    python -m benchmarks.growth       its time and memory over the batch and the images' size
    python -m benchmarks.scaling      several processes: what they send, cost, and would on 64 GPUs
    python -m benchmarks.convert      somebody's model before and after `convert`
    python -m benchmarks.checkpoint   what the digest of a checkpoint costs
    python -m benchmarks.sync         a batch norm that shares its statistics with another process
    python -m benchmarks.tune         launch plans for this GPU, into kernels/plans.json
    python -m benchmarks.defaults     how good the default runs are over seeds
    python -m benchmarks.soak         whether long trainings grow: memory and open files, 30 minutes
    python -m benchmarks.norm_study   how well each norm trains: the runs of `study=` as a report

On a GPU machine:

    pip install -e ".[dev,peers]"
    python -m benchmarks.gpu

norms, moves, host, step, profile, growth, convert, scaling, sync and soak write JSON below
`benchmarks/results/`, or where --out says.
"""
