"""generate() under a QuireCache gives the tokens of transformers' own eager attention and DynamicCache."""

import copy

import pytest

hf = pytest.importorskip("hf_models", reason="PyTorch and transformers are not installed")
import quire  # noqa: E402
from hf_models import DEVICES, MODELS, eager, make, prompts, torch, with_quire  # noqa: E402

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_eager(name, device):
    model = make(name, device)
    for inputs in (prompts(1, 13, device=device), prompts(3, 20, padding=(5, 0, 19), device=device)):
        assert torch.equal(with_quire(model, inputs), eager(model, inputs))


def test_chunked_attention(device):
    sizes = dict(
        hf.SIZES,
        attention_chunk_size=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        intermediate_size_mlp=96,
        no_rope_layers=[1, 1, 1, 0],
    )
    config = hf.transformers.Llama4TextConfig(**sizes)
    torch.manual_seed(5)
    model = hf.transformers.Llama4ForCausalLM(config).eval().to(device)
    inputs = prompts(2, 40, padding=(7, 0), device=device)
    assert torch.equal(with_quire(model, inputs), eager(model, inputs))


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_beams_share_pages(name, device):
    model, inputs = make(name, device), prompts(2, 37, padding=(3, 0), device=device)
    options = dict(num_beams=3, num_return_sequences=2)
    cache = quire.hf.QuireCache(model.config, "auto")
    assert torch.equal(with_quire(model, inputs, cache, **options), eager(model, inputs, **options))
    full = next(layer for layer in cache.layers if not layer.is_sliding)
    # Six beams of 60 tokens would have 24 pages; those of one prompt share its two full pages.
    assert full.pages.pages_in_use < 24


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Lfm2"])
def test_prompt_lookup_crops_the_cache(name, device):
    model = make(name, device)
    inputs = prompts(1, 12, device=device)
    inputs = {key: value.repeat(1, 4) for key, value in inputs.items()}
    assert torch.equal(with_quire(model, inputs, prompt_lookup_num_tokens=4), eager(model, inputs))


def test_assisted_generation(device):
    model, assistant = make("Llama", device), make("Llama", device, num_hidden_layers=1)
    inputs = prompts(1, 20, device=device)
    assert torch.equal(with_quire(model, inputs, assistant_model=assistant), eager(model, inputs))


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_one_cache_for_several_calls(name, device):
    model, inputs = make(name, device), prompts(2, 20, padding=(5, 0), device=device)
    cache = quire.hf.QuireCache(model.config, "auto")
    tokens = with_quire(model, inputs, cache, max_new_tokens=9)
    more = prompts(2, 7, device=device, seed=2)["input_ids"]
    tokens = torch.cat([tokens, more], dim=1)
    mask = torch.ones_like(tokens)
    mask[:, :20] = inputs["attention_mask"]
    inputs = {"input_ids": tokens, "attention_mask": mask}
    assert cache.get_seq_length() == 28
    assert torch.equal(with_quire(model, inputs, cache), eager(model, inputs))


def test_a_prompt_serves_several_continuations(device):
    model = make("Gemma2", device)
    prompt = prompts(1, 30, device=device)
    cache = quire.hf.QuireCache(model.config, "auto")
    hf.logits(model, "quire", prompt, past_key_values=cache)
    for seed in (3, 4):
        tokens = torch.cat([prompt["input_ids"], prompts(1, 5, device=device, seed=seed)["input_ids"]], dim=1)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        assert torch.equal(with_quire(model, inputs, copy.deepcopy(cache)), eager(model, inputs))
    assert cache.get_seq_length() == 30


def test_prefill_in_chunks(device):
    model, inputs = make("Gemma2", device), prompts(2, 50, padding=(23, 0), device=device)
    assert torch.equal(with_quire(model, inputs, prefill_chunk_size=16), eager(model, inputs))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, device):
    """The logits of the first new token: within what rounding K, V and the output to the model's dtype can do."""
    model = make("Llama", device).to(getattr(torch, dtype))
    inputs = prompts(2, 20, padding=(5, 0), device=device)
    exact = hf.logits(make("Llama", device), "eager", inputs)[:, -1]
    quire_error = hf.logits(model, "quire", inputs, past_key_values=quire.hf.QuireCache(model.config, "auto"))[:, -1]
    eager_error = hf.logits(model, "eager", inputs)[:, -1]
    norm = torch.linalg.norm
    # Eager rounds logits and weights too, so quire is no farther from fp32 than eager is, but for luck.
    assert norm(quire_error - exact) < 1.5 * norm(eager_error - exact)


@pytest.mark.parametrize("mode", [mode.name for mode in quire.modes() if mode.compiled])
def test_every_mode(mode, device):
    """What is stored does not depend on padding, other sequences or chunks (test_hf_perplexity.py has the modes' own
    errors). One layer, so that its keys and values do not
    either, but for the last bits of matrix products, which move a code here and there."""
    model = make("Llama", device, num_hidden_layers=1)
    inputs = prompts(2, 40, padding=(5, 0), device=device)
    cache = quire.hf.QuireCache(model.config, mode)
    hf.logits(model, "quire", {key: value[:, :30] for key, value in inputs.items()}, past_key_values=cache)
    found = hf.logits(
        model,
        "quire",
        {"input_ids": inputs["input_ids"][:, 30:], "attention_mask": inputs["attention_mask"]},
        past_key_values=cache,
    )[0, -1]
    alone = {"input_ids": inputs["input_ids"][:1, 5:], "position_ids": torch.arange(5, 40, device=device)[None]}
    expected = hf.logits(model, "quire", alone, past_key_values=quire.hf.QuireCache(model.config, mode))[0, -1]
    norm = torch.linalg.norm
    assert norm(found - expected) < 0.02 * norm(expected)


def test_a_compiled_model_leaves_the_graph_at_attention(device):
    model, inputs = make("Llama", device, num_hidden_layers=2), prompts(2, 20, padding=(3, 0), device=device)
    expected = hf.logits(model, "eager", inputs)
    model.set_attn_implementation("quire")
    cache = quire.hf.QuireCache(model.config, "auto")
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(**inputs, past_key_values=cache).logits
    seen = inputs["attention_mask"].bool()
    assert torch.allclose(found[seen], expected[seen], atol=1e-4)
