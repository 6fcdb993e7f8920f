import numpy as np
import pytest

from dpo_opt.analysis.load import scan_pair_logps, scan_shards
from dpo_opt.analysis.token_texts import Part, TokenDecoder, pair_texts, plain
from dpo_opt.schemas.pair_logps import PairLogps, write_pair_logps

LONG = "so it goes, and goes on, " * 60


@pytest.fixture
def coloured(tmp_path, shards_writer):
    """Pairs whose letters take several tokens, one longer than a page shows, and their texts."""
    pairs = shards_writer(
        tmp_path / "shards",
        [("Q?", " Ünïcödé \N{BOOKS} ok", " no"), ("Q2?", LONG, " kürzer"), ("Q3?", " half counts", " n")],
        masked=True,
    )
    random = np.random.default_rng(0)
    rows = []
    for pair in pairs:
        counted = {"chosen": pair.chosen_mask, "rejected": pair.rejected_mask}
        tokens = {}
        for side, mask in counted.items():
            ref = getattr(pair, f"ref_{side}_token_logps")
            ref = ref if mask is None else ref[mask]
            tokens[side] = (ref + random.normal(0, 0.5, len(ref))).astype(np.float32)
        rows.append(
            PairLogps(
                row=pair.row,
                pair_id=pair.pair_id,
                step=3,
                epoch=1.0,
                phase="score",
                checkpoint="final",
                **{f"{side}_logps": float(t.sum(dtype=np.float64)) for side, t in tokens.items()},
                **{f"{side}_length": len(t) for side, t in tokens.items()},
                **{f"{side}_token_logps": t for side, t in tokens.items()},
            )
        )
    write_pair_logps(tmp_path / "scores.parquet", [rows])
    policy = scan_pair_logps(tmp_path / "scores.parquet")
    decoder = TokenDecoder(tmp_path / "shards")
    return pairs, rows, pair_texts(scan_shards(tmp_path / "shards"), [0, 1, 2], decoder, policy)


def test_the_log_ratios_of_a_side_sum_to_its_own(coloured):
    pairs, rows, texts = coloured
    for pair, row in zip(pairs, rows, strict=True):
        text = texts[pair.row]
        assert text.has_logratios
        for side in ("chosen", "rejected"):
            moved = getattr(row, f"{side}_logps") - getattr(pair, f"ref_{side}_logps")
            parts = [part.logratio for part in getattr(text, side) if not part.context]
            assert sum(parts) == pytest.approx(moved, abs=1e-4)


def test_text_is_whole_whatever_its_tokens_are(coloured):
    _, _, texts = coloured
    assert plain(texts[0].chosen) == " Ünïcödé \N{BOOKS} ok"
    assert plain(texts[1].rejected) == " kürzer"
    assert not any("\N{REPLACEMENT CHARACTER}" in part.text for part in texts[0].chosen)


def test_what_is_cut_is_one_part_with_its_sum(coloured):
    _, rows, texts = coloured
    *shown, rest = texts[1].chosen
    assert LONG.startswith("".join(part.text for part in shown))
    assert f"more tokens: {rest.logratio:+.2f}".replace("-", "−") in rest.text
    assert f"{len(LONG) - sum(len(part.text) for part in shown)} more tokens" in rest.text
    assert len(rows) == 3


def test_context_has_no_log_ratio(coloured):
    pairs, _, texts = coloured
    context = [part for part in texts[1].chosen if part.context]
    assert plain(context) == LONG[: len(pairs[1].chosen_ids) // 2][: len(plain(context))]
    assert all(part.logratio is None for part in context)


def test_shades_follow_sign_and_size():
    found = [Part("a", False, r).shade for r in (None, 0.0, 0.04, 0.06, -0.3, 0.7, -5.0, float("nan"))]
    assert found == ["", "", "", "up1", "down2", "up3", "down4", ""]


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[]", b'{"model": "\xff"}'])
def test_ids_are_shown_where_the_tokenizers_file_is_none(tmp_path, content):
    file = tmp_path / "tokenizer" / "tokenizer.json"
    file.parent.mkdir()
    file.write_bytes(content)
    decoder = TokenDecoder(tmp_path)
    assert decoder.text([5, 17]) == "5 17"
    assert decoder.problem == "Token ids are shown because tokenizer/tokenizer.json is not readable."
