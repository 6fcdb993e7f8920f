"""A merged model against the adapter's own forward, and against the digest that training expects of it."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dpo_opt.commands.merge import MergeConfig
from dpo_opt.merge import merge
from dpo_opt.optimize.adapters.adapter_folder import Adapter, read_adapter
from dpo_opt.optimize.adapters.lora import add_adapter, plan_adapter, save_adapter
from dpo_opt.optimize.adapters.merging import Merged, merge_tensor, merged_digests
from dpo_opt.optimize.config import TrainConfig
from dpo_opt.schemas.errors import ConfigError, DpoOptError
from dpo_opt.schemas.models import checkpoint_dtype, config_digest
from dpo_opt.schemas.progress import Silent
from dpo_opt.schemas.storage import file_names
from dpo_opt.schemas.weights import weights_digest

pytest.importorskip("peft")


def train_adapter(base: Path, folder: Path, *, strength: float = 0.1) -> Path:
    """An adapter with made-up values, as large as a trained one's, in its own folder."""
    config = TrainConfig(
        shards="unused", model=str(base), output_dir="unused", use_peft=True, lora_r=4, lora_alpha=8
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_adapter(model, plan_adapter(config, base), seed=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(strength * torch.randn(parameter.shape, generator=generator))
    folder.mkdir()
    save_adapter(model, folder, base="base", base_weights=weights_digest(base))
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_adapter(tiny_model, tmp_path_factory.mktemp("adapter") / "adapter")


def merged(base: Path, adapter: Path, output: Path, **options: Any) -> Path:
    merge(MergeConfig(model=str(base), adapter=adapter, output=output, **options))
    return output


def logits(model: Any) -> torch.Tensor:
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, 100, (2, 30)))
    with torch.no_grad():
        return model.eval()(ids).logits


def adapted_logits(base: Path, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter))


def test_the_merged_model_is_the_base_with_its_adapter(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    result = merge(MergeConfig(model=str(tiny_model), adapter=adapter, output=output))
    assert result == {"output": str(output), "layers": 14, "rank": 4, "lost": result["lost"]}
    assert result["lost"] < 1e-6
    found = logits(AutoModelForCausalLM.from_pretrained(output))
    torch.testing.assert_close(found, adapted_logits(tiny_model, adapter), rtol=0, atol=1e-5)
    assert (found - logits(AutoModelForCausalLM.from_pretrained(tiny_model))).abs().max() > 0.1


def test_everything_else_of_the_base_is_kept(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    # transformers would read this and refuse to write it.
    (base / "generation_config.json").write_text('{"temperature": 0.9}')
    (base / "README.md").write_text("about the base")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_bytes(b"{{ messages }}\r\n")
    (base / "spiece.model").write_bytes(b"\x00\xff")
    output = merged(base, adapter, tmp_path / "merged")
    kept = set(file_names(base)) - {"model.safetensors", "README.md"}
    assert len(kept) >= 6
    for name in kept:
        assert (output / name).read_bytes() == (base / name).read_bytes()
    assert file_names(output) == file_names(base)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, output))
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == {f"{layer}.weight" for layer in read_adapter(adapter).layers}
    AutoTokenizer.from_pretrained(output)
    assert "base_model" in (output / "README.md").read_text()
    assert str(tmp_path) not in (output / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard_size", ["5GB", "100KB"])
def test_the_digest_of_the_merged_model_is_known_before_it_is_written(
    tiny_model: Path, tmp_path: Path, dtype: torch.dtype, shard_size: str
) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    model.save_pretrained(base, max_shard_size=shard_size)
    assert (len(list(base.glob("*.safetensors"))) > 1) == (shard_size == "100KB")
    own = train_adapter(base, tmp_path / "adapter")
    output = merged(base, own, tmp_path / "merged")
    whole = merged(base, own, tmp_path / "whole", dtype="float32")
    digests = [weights_digest(folder) for folder in (output, whole)]
    assert list(merged_digests(base, read_adapter(own))) == digests
    assert (len({*digests, weights_digest(base)}) == 3) == (dtype == torch.bfloat16)
    assert {w.dtype for f in whole.glob("*.safetensors") for w in load_file(f).values()} == {torch.float32}
    assert (checkpoint_dtype(whole), config_digest(whole)) == ("float32", config_digest(base))
    assert config_digest(output) == config_digest(base)
    assert {w.dtype for f in output.glob("*.safetensors") for w in load_file(f).values()} == {dtype}


def test_merging_is_exact_arithmetic_whatever_the_machine(adapter: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(301, 1000, generator=generator)
    a, b = torch.randn(4, 1000, generator=generator), torch.randn(301, 4, generator=generator)
    plain = read_adapter(adapter)

    def compute(w: torch.Tensor, adapter: Adapter, dtype: torch.dtype = torch.float32) -> Merged:
        return merge_tensor(w, a, b, adapter=adapter, dtype=dtype)

    found = compute(weight, plain).tensor
    # numpy rounds each product and each sum once, in the same order.
    total = np.zeros((301, 1000), np.float32)
    for k in range(4):
        total += (b.numpy()[:, k : k + 1] * np.float32(2)) * a.numpy()[k : k + 1]
    assert np.array_equal(found.numpy(), weight.numpy() + total)
    exact = weight.double() + 2 * (b.double() @ a.double())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        assert torch.equal(compute(weight, plain).tensor, found)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(compute(weight.T, plain._replace(transposed=True)).tensor, found.T)
    root = compute(weight, plain._replace(rslora=True)).tensor
    torch.testing.assert_close(root - weight, 2 * (found - weight), rtol=0, atol=1e-5)
    rounded = compute(weight, plain, torch.bfloat16)
    assert torch.equal(rounded.tensor, found.bfloat16())
    assert rounded.change == pytest.approx(float(np.square(total.astype(np.float64)).sum()), rel=1e-5)
    assert rounded.error == pytest.approx(float((found - found.bfloat16()).double().square().sum()), rel=1e-5)


def test_what_rounding_takes_away_is_said(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    own = train_adapter(base, tmp_path / "adapter", strength=3e-4)
    said: list[str] = []

    class Heard(Silent):
        def say(self, line: str) -> None:
            said.append(line)

    results = {
        dtype: merge(
            MergeConfig(model=str(base), adapter=own, output=tmp_path / dtype, dtype=dtype), progress=Heard()
        )
        for dtype in ("auto", "float32")
    }
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "auto"))
    exact = load_file(tmp_path / "float32" / "model.safetensors")
    error = sum(float((after[n].double() - exact[n].double()).square().sum()) for n in exact)
    change = sum(float((exact[n].double() - before[n].double()).square().sum()) for n in exact)
    assert results["auto"]["lost"] == pytest.approx((error / change) ** 0.5, rel=1e-3)
    assert results["auto"]["lost"] > 0.3
    assert results["float32"]["lost"] < 1e-3
    assert len(said) == 1
    assert f"lost {results['auto']['lost']:.0%} of the adapter's change; --dtype float32" in said[0]


def test_weights_that_are_kept_the_other_way_round(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    torch.manual_seed(0)
    base = tmp_path / "base"
    GPT2LMHeadModel(config).save_pretrained(base)
    # As GPT-2 was released: without the first part of the names.
    weights = load_file(base / "model.safetensors")
    short = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
    save_file(short, base / "model.safetensors", metadata={"format": "pt"})
    adapter = train_adapter(base, tmp_path / "adapter")
    output = merged(base, adapter, tmp_path / "merged")
    found = logits(AutoModelForCausalLM.from_pretrained(output))
    torch.testing.assert_close(found, adapted_logits(base, adapter), rtol=0, atol=1e-5)
    assert weights_digest(output) in list(merged_digests(base, read_adapter(adapter)))


def test_nothing_is_left_behind_where_merging_fails(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    odd = Path(shutil.copytree(adapter, tmp_path / "odd"))
    save_file({**weights, name: torch.zeros(7, 4)}, odd / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"layer model\.layers\.1\.mlp\.up_proj of shape \[7, 64\]; there"):
        merged(tiny_model, odd, tmp_path / "merged")
    assert {path.name for path in tmp_path.iterdir()} == {"odd"}


def damaged(adapter: Path, folder: Path, kind: str) -> Path:
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    elif kind == "no weights":
        file.unlink()
    elif kind == "half a pair":
        weights = load_file(file)
        weights.popitem()
        save_file(weights, file)
    elif kind == "more than pairs":
        save_file({**load_file(file), "base_model.model.lm_head.weight": torch.zeros(2)}, file)
    elif kind == "not json":
        (folder / "adapter_config.json").write_text("{")
    elif kind == "empty":
        save_file({}, file)
    return folder


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "the adapter's weights cannot be read"),
        ("no weights", "holds no adapter_model.safetensors"),
        ("half a pair", r"not pairs of LoRA matrices of rank 4 \(see .*lora_"),
        ("more than pairs", r"not pairs of LoRA matrices of rank 4 \(see .*lm_head"),
        ("not json", "not an adapter's configuration"),
        ("empty", "not pairs of LoRA matrices"),
    ],
)
def test_a_damaged_adapter_is_refused(
    tiny_model: Path, adapter: Path, tmp_path: Path, kind: str, message: str
) -> None:
    with pytest.raises(DpoOptError, match=message):
        merged(tiny_model, damaged(adapter, tmp_path / "damaged", kind), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_another_base_is_refused(other_model: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained on a base with weights"):
        merged(other_model, adapter, tmp_path / "merged")
    # An adapter from elsewhere does not say what its base was.
    elsewhere = Path(shutil.copytree(adapter, tmp_path / "elsewhere"))
    save_file(load_file(adapter / "adapter_model.safetensors"), elsewhere / "adapter_model.safetensors")
    merged(other_model, elsewhere, tmp_path / "merged")


def test_a_second_copy_of_the_weights_is_refused(model: Path, adapter: Path, tmp_path: Path) -> None:
    shutil.copyfile(model / "model.safetensors", model / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors stands beside"):
        merged(model, adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_copy_in_mistrals_format_is_left_behind_and_not_merged(
    tiny_model: Path, model: Path, adapter: Path, tmp_path: Path
) -> None:
    for name in ("consolidated.safetensors", "consolidated.safetensors.index.json"):
        (model / name).write_bytes(b"the same weights")
    plain = merged(tiny_model, adapter, tmp_path / "plain")
    output = merged(model, adapter, tmp_path / "merged")
    files = {path.name for path in plain.iterdir()}
    assert {path.name for path in output.iterdir()} == files
    assert weights_digest(output) == weights_digest(plain)
    assert next(merged_digests(model, read_adapter(adapter))) == weights_digest(plain)


def test_a_quantized_base_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    with pytest.raises(ConfigError, match="the base's weights are quantized"):
        merged(base, adapter, tmp_path / "merged")


def test_a_used_output_folder_is_refused(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "file").touch()
    with pytest.raises(ConfigError, match="already in use"):
        merged(tiny_model, adapter, tmp_path / "merged")
    (tmp_path / "merged" / "file").unlink()
    merged(tiny_model, adapter, tmp_path / "merged")
