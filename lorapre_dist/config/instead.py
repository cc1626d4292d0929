"""What is refused, and what to do instead."""

from __future__ import annotations

#: Why gradients are not released there, and what is possible instead.
RELEASE_UNDER_DEEPSPEED = (
    "release_gradients=True: DeepSpeed's engine collects gradients in buffers of its own and steps when all are there; "
    "leave it out: ZeRO-2 and 3 keep a part of them on each rank, stage 3 widens one sub_group_size of them at a time, "
    "and offload_optimizer keeps them in host memory. Or train under FSDP2"
)
# Options of torch's and DeepSpeed's optimizers that mean nothing here.
ELSEWHERE = {
    **dict.fromkeys(("fused", "foreach", "capturable", "differentiable"), "there is one implementation; leave it out"),
    **dict.fromkeys(("torch_adam", "adam_w_mode", "set_grad_none"), "it chooses among DeepSpeed's Adams; leave it out"),
    "amsgrad": "the second moment is low-rank, without a maximum; leave it out",
    "learning_rate": "it is called 'lr'",
    "maximize": "negate the loss instead",
    "bias_correction": "it is always on; leave it out",
    "eps_inside_sqrt": "eps is added to the square root; leave it out",
    "max_grad_norm": "use the DeepSpeed JSON's gradient_clipping",
}
