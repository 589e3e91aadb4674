"""Small models of real architectures with random weights, for the tests of quire.hf."""

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.17", reason="transformers 5.17 is not installed")

import quire.hf  # noqa: E402
from conftest import cuda_is_there  # noqa: E402

torch.set_num_threads(1)  # the models are so small that threads only wait for each other
transformers.logging.set_verbosity_error()

DEVICES = ["cpu"] + (["cuda:0"] if cuda_is_there() and torch.cuda.is_available() else [])
SIZES = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=4096,
)

# What each has that others have not: grouped queries; norms of q and k; softcap and layers with a window; sinks and a
# window; chunks; layers that keep a state; layers that read the rows of another.
MODELS = {
    "Llama": {},
    "Qwen3": {},
    "Gemma2": dict(sliding_window=8, query_pre_attn_scalar=48, attn_logit_softcapping=2.0),
    "GptOss": dict(sliding_window=8, num_local_experts=4, num_experts_per_tok=2),
    "Mistral": dict(sliding_window=8),
    "Gemma3n": dict(
        num_kv_shared_layers=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=16,
        vocab_size_per_layer_input=96,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
    ),
    "Lfm2": dict(layer_types=["conv", "full_attention", "conv", "full_attention"]),
}


def make(name, device="cpu", **changes):
    """A model of that architecture, whose weights are large enough for attention to look at something."""
    of = next(c for c in (f"{name}TextConfig", f"{name}Config") if hasattr(transformers, c))
    config = getattr(transformers, of)(**{**SIZES, **MODELS.get(name, {}), **changes})
    torch.manual_seed(5)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2.0 / parameter.shape[-1] ** 0.5)
            elif parameter.numel() == SIZES["num_attention_heads"]:  # sinks
                parameter.normal_()
    return model


def prompts(batch=2, length=20, padding=(), device="cpu", seed=1):
    """Tokens and their mask, sequence b having padding[b] columns of padding at the left."""
    ids = torch.randint(3, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for b, count in enumerate(padding):
        ids[b, :count], mask[b, :count] = 0, 0
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


GREEDY = dict(max_new_tokens=24, do_sample=False, pad_token_id=0, eos_token_id=None)


def eager(model, inputs, **options):
    model.set_attn_implementation("eager")
    return model.generate(**inputs, **{**GREEDY, **options})


def with_quire(model, inputs, cache=None, mode="auto", **options):
    model.set_attn_implementation("quire")
    cache = quire.hf.QuireCache(model.config, mode) if cache is None else cache
    return model.generate(**inputs, past_key_values=cache, **{**GREEDY, **options})


def logits(model, implementation, inputs, **options):
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        return model(**inputs, **options).logits
