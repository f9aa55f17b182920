"""Parameters and floating-point operations of a model, and the peak rates of GPUs."""

from __future__ import annotations

from streaming_rwkv.model.config import RWKV7Config

# Dense bf16 without sparsity, in FLOP/s, from NVIDIA's data sheets. A device has the rate of the first name in its own.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of the device that torch names, or None if it is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


def parameter_count(config: RWKV7Config) -> int:
    """Return the number of trained parameters, embedding and head included.

    BlinkDL's files also store `att.v0`, `v1` and `v2` of layer 0, which are not used: C·(2·v_rank + 1) more.
    """
    width, ffn, layers = config.hidden_size, config.ffn_size, config.num_layers
    norms_and_mixes = 6 + 1 + 4 + 2 + 3 + 2  # x_*, ffn.x_k; ln1, ln2; ln_x; k_k, k_a, r_k; w0, a0
    matrices = 4 * width * width + 2 * width * ffn
    ranks = config.decay_rank + config.a_rank + config.gate_rank
    per_layer = matrices + width * (norms_and_mixes + 2 * ranks)
    value_residual = width * (2 * config.v_rank + 1)
    return (
        2 * config.vocab_size * width + 4 * width + layers * per_layer + (layers - 1) * value_residual
    )  # ln0 and ln_out: 4·C


def flops_per_token(config: RWKV7Config) -> int:
    """Return the FLOPs of one trained token, forward and backward, where a multiply-add counts as two.

    They are 6 per weight of every matrix that a token is multiplied by, and 27·N·C per layer for the recurrence. The
    embedding is a look-up and costs nothing; recomputation (activation checkpointing) is not counted.
    """
    width, layers = config.hidden_size, config.num_layers
    matrices = layers * (4 * width * width + 2 * width * config.ffn_size)
    loras = 2 * width * (layers * (config.decay_rank + config.a_rank + config.gate_rank) + (layers - 1) * config.v_rank)
    head = width * config.vocab_size
    return 6 * (matrices + loras + head) + 27 * config.head_size * width * layers


def flops_per_token_6n(config: RWKV7Config) -> int:
    """Return 6 · (parameters), as BlinkDL's README does, which counts the embedding but not the recurrence."""
    return 6 * parameter_count(config)
