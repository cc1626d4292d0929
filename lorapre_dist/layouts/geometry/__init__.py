"""Which elements of every parameter each rank holds, from shapes and the number of ranks alone: no torch, no ranks.

    flat           a flat buffer cut into equal parts: ZeRO-1/2, and each of FSDP1's flat parameters
    per_parameter  every parameter cut into equal parts: ZeRO-3
    rows           slices of dimensions: FSDP2, hybrid sharding, tensor parallelism
    dealt          whole matrices dealt out: DDP
    axes           several at once: tensor parallelism cut again by any of these, stages of a pipeline

The layouts read the same out of a framework's objects with the integers that are here; a plan has nothing else.
"""
