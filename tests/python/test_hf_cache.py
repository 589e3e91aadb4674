"""What a QuireCache holds, what it costs, and what it says when it is misused."""

import pytest

hf = pytest.importorskip("hf_models", reason="PyTorch and transformers are not installed")
import quire  # noqa: E402
from hf_models import DEVICES, make, prompts, torch  # noqa: E402
from quire.hf.memory import GrowingMemory  # noqa: E402
from quire.hf.pages import HostMask, Pages, Window  # noqa: E402


def run(model, inputs, cache, columns=slice(None)):
    """One forward pass over some columns."""
    end = columns.stop or inputs["input_ids"].shape[1]
    return hf.logits(
        model,
        "quire",
        {"input_ids": inputs["input_ids"][:, columns], "attention_mask": inputs["attention_mask"][:, :end]},
        past_key_values=cache,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", ["left", "right", "middle"])
def test_padding_anywhere(padding, device):
    model, inputs = make("Llama", device), prompts(3, 40, device=device)
    columns = {"left": slice(0, 11), "right": slice(29, 40), "middle": slice(17, 23)}[padding]
    inputs["attention_mask"][1, columns] = 0
    found = run(model, inputs, quire.hf.QuireCache(model.config, "auto"))
    expected = hf.logits(model, "eager", inputs)
    seen = inputs["attention_mask"].bool()
    assert torch.allclose(found[seen], expected[seen], atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_long_prompt_keeps_only_the_window(device):
    model, inputs = make("Gemma2", device, num_hidden_layers=2), prompts(2, 2100, padding=(1050, 0), device=device)
    cache = quire.hf.QuireCache(model.config, "auto")
    found = run(model, inputs, cache)
    expected = hf.logits(model, "eager", inputs)
    seen = inputs["attention_mask"].bool()
    assert torch.allclose(found[seen], expected[seen], atol=1e-4)
    sliding, full = (
        next(layer.pages for layer in cache.layers if layer.is_sliding is wanted) for wanted in (True, False)
    )
    assert full.num_pages == -(-2100 // 16) + -(-1050 // 16)
    assert sliding.num_pages < 2 * (1024 + 32) // 16 + 4  # one piece and the window, of each sequence
    run(model, {key: torch.cat([value, value[:, -1:]], 1) for key, value in inputs.items()}, cache, slice(2100, 2101))
    assert sliding.pages_in_use <= 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_crop_goes_back(name, device):
    model, inputs = make(name, device), prompts(2, 60, padding=(35, 0), device=device)
    cache = quire.hf.QuireCache(model.config, "auto")
    cache.activate_past_recording()
    run(model, inputs, cache, slice(0, 60))
    cache.crop(-26)  # into the padding of the first sequence
    assert cache.get_seq_length() == 34
    again = run(model, inputs, cache, slice(34, 60))
    expected = hf.logits(model, "eager", inputs)[:, 34:]
    seen = inputs["attention_mask"][:, 34:].bool()
    assert torch.allclose(again[seen], expected[seen], atol=1e-4)


def test_a_window_that_is_gone_cannot_be_cropped_back():
    model, inputs = make("Gemma2"), prompts(1, 60)
    cache = quire.hf.QuireCache(model.config, "auto")
    run(model, inputs, cache, slice(0, 59))
    run(model, inputs, cache, slice(59, 60))
    with pytest.raises(quire.UnsupportedError, match="crop by 40 tokens .* a window of 8 has dropped"):
        cache.crop(-40)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_the_batch(device):
    """Copies share pages until they are written to, and then go apart."""
    model = make("Gemma2", device)
    inputs = prompts(2, 21, padding=(3, 0), device=device)
    cache = quire.hf.QuireCache(model.config, "auto")
    run(model, inputs, cache)
    before = cache.num_bytes
    cache.batch_repeat_interleave(2)
    assert cache.num_bytes == before
    more = prompts(4, 5, device=device, seed=8)
    rows = torch.tensor([0, 0, 1, 1], device=device)
    joined = {key: torch.cat([inputs[key][rows], more[key]], 1) for key in inputs}
    found = run(model, joined, cache, slice(21, 26))
    assert torch.allclose(found, hf.logits(model, "eager", joined)[:, 21:], atol=1e-4)
    cache.batch_select_indices(torch.tensor([3, 1], device=device))
    kept = {key: torch.cat([value, value[:, :3]], 1)[[3, 1]] for key, value in joined.items()}
    kept["attention_mask"][:, 26:] = 1
    found = run(model, kept, cache, slice(26, 29))
    assert torch.allclose(found, hf.logits(model, "eager", kept)[:, 26:], atol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.num_bytes == 0
    found = run(model, inputs, cache)
    seen = inputs["attention_mask"].bool()
    assert torch.allclose(found[seen], hf.logits(model, "eager", inputs)[seen], atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_grows_where_it_is(device):
    model, inputs = make("Llama", device), prompts(1, 1500, device=device)
    cache = quire.hf.QuireCache(model.config, "int8_per_token_head")
    run(model, inputs, cache, slice(0, 10))
    layer = cache.layers[0]
    memory, views = layer._memory.tensor, layer._views
    run(model, inputs, cache, slice(10, 1500))
    assert layer._memory.tensor is memory and layer._views is views
    spec = quire.KVCacheSpec("int8_per_token_head", head_size=32, num_kv_heads=2)
    # A page's rows and scales, rounded up to 256 bytes.
    assert layer.page_bytes - quire.make_layout(spec).bytes_per_token * 16 < 256
    assert cache.num_bytes == 4 * layer.page_bytes * -(-1500 // 16)


def test_memory_that_cannot_be_reserved_is_copied(monkeypatch):
    monkeypatch.setattr("quire.hf.memory._reserve_host", lambda capacity: None)
    model, inputs = make("Llama"), prompts(2, 300)
    cache = quire.hf.QuireCache(model.config, "auto")
    found = torch.cat([run(model, inputs, cache, slice(begin, begin + 100)) for begin in (0, 100, 200)], dim=1)
    assert torch.allclose(found, hf.logits(model, "eager", inputs), atol=1e-4)


def test_memory_is_given_back():
    memory = GrowingMemory(torch.device("cpu"), 1 << 34)
    memory.commit(1 << 20)
    memory.tensor[: 1 << 20] = 1
    before = resident()
    memory.commit(1 << 26)
    memory.tensor[: 1 << 26] = 1
    assert resident() - before > 30 << 20
    del memory
    assert resident() - before < 10 << 20


def resident():
    """The bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_decoding_keeps_its_plans_and_buffers(monkeypatch):
    model, inputs = make("Gemma2"), prompts(2, 40)
    cache = quire.hf.QuireCache(model.config, "auto")
    run(model, inputs, cache, slice(0, 20))
    run(model, inputs, cache, slice(20, 21))
    made = []
    monkeypatch.setattr("quire.hf.cache.plan_unified_attention", lambda problem: made.append(problem))
    monkeypatch.setattr("quire.hf.pages.Step.__init__", lambda *arguments: made.append(arguments))
    for column in range(21, 40):
        run(model, inputs, cache, slice(column, column + 1))
    assert not made


def test_layers_of_several_modes():
    model, inputs = make("Llama"), prompts(1, 33)
    cache = quire.hf.QuireCache(model.config, "int2_per_token_head", skip_layers=(0, -1))
    assert [layer.mode for layer in cache.layers] == ["auto", "int2_per_token_head", "int2_per_token_head", "auto"]
    run(model, inputs, cache)
    mixed = ["auto", "int4_per_token_head", "k=int8_per_token_head,v=int4_per_token_head", "int8_per_token_head"]
    run(model, inputs, quire.hf.QuireCache(model.config, mixed))


def test_windows_of_pages():
    assert [Window(8).first_key(p) for p in (0, 7, 8, 20)] == [0, 0, 1, 13]
    assert [Window(8, chunked=True).first_key(p) for p in (0, 7, 8, 20)] == [0, 0, 8, 16]
    pages = Pages(Window(), 16, torch.device("cpu"), True)
    new = torch.tensor([[False] * 3 + [True] * 17, [True] * 20])
    (step,) = pages.advance(2, 20, HostMask((2, 0, 20), new, torch.zeros(2, dtype=torch.int64)))
    assert step.seq_lens.tolist() == [17, 20] and step.slots.tolist()[:4] == [-1, -1, -1, 0]
    assert step.cu_seqlens_q.tolist() == [0, 20, 40] and step.max_seq_len == 20 and pages.pages_in_use == 4


# ---- what it says ----------------------------------------------------------------------------------------------------


def refused(error, match, call):
    with pytest.raises(error, match=match):
        call()


def test_sentences():
    model, inputs = make("Llama"), prompts(2, 8)
    cache = quire.hf.QuireCache(model.config, "auto")
    wrong, unsupported = quire.InvalidArgumentError, quire.UnsupportedError
    for implementation in ("eager", "sdpa"):
        refused(
            wrong,
            r'read by its own attention alone, and the model .* model.set_attn_implementation\("quire"\)',
            lambda: hf.logits(model, implementation, inputs, past_key_values=quire.hf.QuireCache(model.config)),
        )
    refused(
        wrong,
        "got keys of type Tensor in LlamaAttention; .* give past_key_values=QuireCache",
        lambda: hf.logits(model, "quire", inputs),
    )
    refused(quire.NotFoundError, "int5", lambda: quire.hf.QuireCache(model.config, "int5"))
    refused(
        wrong, "mode has 2 entries; supported: one name, or 4", lambda: quire.hf.QuireCache(model.config, ["auto"] * 2)
    )
    refused(
        wrong, "skip_layers has 4; the model has 4 layers", lambda: quire.hf.QuireCache(model.config, skip_layers=[4])
    )
    refused(unsupported, "requires a gradient", lambda: model(**inputs, past_key_values=cache))
    cache.reset()
    run(model, inputs, cache)
    refused(
        wrong,
        "the batch has 1 sequences, and QuireCache holds 2; call reset",
        lambda: run(model, prompts(1, 9), cache, slice(8, 9)),
    )
    more = prompts(2, 9)
    refused(
        wrong,
        r"attention_mask is \[2, 3\]; supported: \[2, 9\], the 8 columns in the cache and the 1 new",
        lambda: hf.logits(
            model,
            "quire",
            {"input_ids": more["input_ids"][:, 8:], "attention_mask": torch.ones(2, 3)},
            past_key_values=cache,
        ),
    )
    more["attention_mask"][0, 0] = 0
    refused(
        wrong,
        r"shows \[7, 8\] tokens among the 8 columns .* stored with \[8, 8\]",
        lambda: run(model, more, cache, slice(8, 9)),
    )
    four = torch.zeros(2, 1, 8, 8)
    refused(
        unsupported,
        r"attention_mask is \[2, 1, 8, 8\]; supported: \[batch, columns\]",
        lambda: hf.logits(
            model, "quire", {**inputs, "attention_mask": four}, past_key_values=quire.hf.QuireCache(model.config)
        ),
    )
    refused(unsupported, "QuireCache does not offload", lambda: cache.layers[0].offload())


def test_a_mask_that_is_not_causal_is_refused():
    model = make("Llama")
    model.config.is_causal = False
    refused = pytest.raises(quire.UnsupportedError, match="neither causal, nor a causal window, nor causal chunks")
    with refused:
        run(model, prompts(1, 8), quire.hf.QuireCache(model.config))


def test_another_models_cache_is_refused():
    model = make("Mistral")
    cache = quire.hf.QuireCache(make("Llama").config)
    with pytest.raises(quire.InvalidArgumentError, match="sliding_window 8, and QuireCache was made for none"):
        run(model, prompts(1, 8), cache)
