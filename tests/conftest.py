"""What every test stands on: a tiny model that is made here, and rules for what a machine may lack."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_opt.precompute.engine.vllm_build import prepare_environment, vllm_version

# Before anything imports torch: OpenMP reads its variables once, and nothing here may reach for the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
prepare_environment()
os.environ.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ m['role'] }}: {{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
# Tokens that join letters, so that words are shorter in tokens than in bytes and may merge across a boundary.
MERGES = ["h e", "i n", "e r", "o n", "Ġ t", "Ġt he", "Ġ a", "in g", "o u", "Ġ w", "a n", "an d"]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what the machine lacks, unless the environment says that it must be there."""
    if item.get_closest_marker("vllm") and vllm_version() is None:
        _lacking("vLLM is not installed", required=os.environ.get("DPO_OPT_REQUIRE_VLLM") == "1")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            _lacking("there is no CUDA device", required=os.environ.get("DPO_OPT_REQUIRE_GPU") == "1")


def _lacking(what: str, *, required: bool) -> None:
    if required:
        pytest.fail(f"{what}, and the environment requires it", pytrace=False)
    pytest.skip(what)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real pairs and a small trained model, where they stand beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the real model and the human pairs are not beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folder of a random Llama with its byte-level tokenizer: context 256, BOS 0, EOS 1, a chat template.

    Shared by all tests: to change a file, take ``model``.
    """
    folder = tmp_path_factory.mktemp("tiny-model")
    make_tiny_model(folder, seed=0)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, "a test changed tiny_model"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of ``tiny_model`` that may be changed."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Like ``tiny_model``, with other weights and the same tokenizer."""
    folder = tmp_path_factory.mktemp("other-model")
    make_tiny_model(folder, seed=1)
    return folder


def make_tiny_model(folder: Path, *, seed: int) -> None:
    """Save a random model; another seed is another model with the same tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    merges = [tuple(merge.split()) for merge in MERGES]
    tokens += [a + b for a, b in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM's CPU attention refuses smaller ones
        max_position_embeddings=256,
        initializer_range=0.1,  # the default leaves every token about equally likely, and hides errors
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
