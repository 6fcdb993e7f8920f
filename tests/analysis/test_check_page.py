import re
from html.parser import HTMLParser

import pytest

from dpo_opt.analysis import reference_view, write_check_page
from dpo_opt.schemas.audit_record import (
    Audit,
    DataSource,
    Estimate,
    Example,
    HardPair,
    LengthBias,
    Lengths,
    Problem,
    ReferenceView,
    SourceCount,
    SourceRanking,
    TruncationForecast,
)
from dpo_opt.schemas.errors import ConfigError

HOSTILE = (
    "</script></style><script>alert(1)</script> \x1b]0;owned\x07 \u202ereversed <img src=http://x onerror=y>"
)
SHOWN = "</script></style><script>alert(1)</script> ]0;owned reversed <img src=http://x onerror=y>"


class Page(HTMLParser):
    """What a browser would see: elements, attributes, text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text = [], [], ""
        self.feed(text)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        # Cells and tiles stand side by side without a space in the text between them.
        self.text += " " if tag in ("td", "th", "b", "span", "div", "small", "dd") else ""

    def handle_data(self, data):
        self.text += data

    def values(self, tag, name):
        return [v for t, n, v in self.attributes if (t, n) == (tag, name)]


def problem(kind="duplicate", severity="note", count=7, examples=0, **words):
    texts = {"title": f"Title of {kind}", "why": f"Why {kind} harms.", "fix": "dpo-opt convert DATA"}
    places = [Example(where=f"{kind}.jsonl:{i}", detail=f"{kind} detail {i}") for i in range(examples)]
    return Problem(kind=kind, severity=severity, count=count, examples=places, **{**texts, **words})


def full_audit():
    return Audit(
        data=[
            DataSource(name="a.jsonl", form="prompt, chosen, rejected", files=1, pairs=1101, bad_rows=3),
            DataSource(name="b/", form="HH-RLHF transcripts", files=17, pairs=905, bad_rows=24),
        ],
        pairs=2006,
        problems=[
            problem(
                "bad_row", "error", 27, examples=5, fix="drop them: `dpo-opt convert a.jsonl`, then go on"
            ),
            problem("contradictory", "warning", 1234, examples=2),
            problem("near_duplicate", "warning", 61),
            problem("duplicate", "note", 1, examples=1),
        ],
        unit="tokens",
        lengths=[
            Lengths(part="prompt", mean=71.25, p50=62, p90=140, p95=170, p99=250, longest=3100),
            Lengths(part="chosen", mean=1050.5, p50=43, p90=91, p95=111, p99=203, longest=907),
            Lengths(part="rejected", mean=38.75, p50=36, p90=82, p95=99, p99=188, longest=1905),
            Lengths(
                part="prompt + longer completion",
                mean=128.5,
                p50=119,
                p90=241,
                p95=283,
                p99=500,
                longest=4021,
            ),
        ],
        length_bias=LengthBias(longer_chosen=0.6543, unequal_pairs=1951, equal_pairs=55),
        sources=[
            SourceCount(
                source="helpful",
                pairs=1500,
                prompts=1401,
                duplicates=13,
                contradictory=19,
                length_bias=LengthBias(longer_chosen=0.7125, unequal_pairs=1480, equal_pairs=20),
                median_prompt=64,
                median_chosen=46,
                median_rejected=37,
            ),
            SourceCount(
                source=None,
                pairs=506,
                prompts=477,
                duplicates=8,
                contradictory=0,
                length_bias=LengthBias(longer_chosen=None, unequal_pairs=0, equal_pairs=506),
                median_prompt=58,
                median_chosen=39,
                median_rejected=35,
            ),
        ],
        truncation=[
            TruncationForecast(
                max_length=256, whole=1003, cut=602, dropped={"prompt_too_long": 351, "empty_completion": 50}
            ),
            TruncationForecast(max_length=1024, whole=2001, cut=5, dropped={}),
        ],
        estimate=Estimate(
            sequences=3971,
            tokens=512345,
            max_length=1024,
            shards=6,
            disk_gb=1234.5,
            parameters=7241732096,
            gpu_hours=0.378,
            assumption="40% of an accelerator's peak",
        ),
        reference=ReferenceView(
            pairs=1955,
            ranking_accuracy=0.5821,
            ranking_accuracy_interval=(0.5612, 0.6034),
            normalised_ranking_accuracy=0.6158,
            margin_quantiles={"p5": -1203.44, "p25": -12.62, "p50": 3.31, "p75": 18.27, "p95": 64.93},
            hardest=[
                HardPair(
                    row=1777,
                    source="helpful",
                    ranking_margin=-2345.67,
                    chosen_length=801,
                    rejected_length=1,
                    prompt="hard prompt",
                    chosen="hard chosen",
                    rejected="hard rejected",
                )
            ],
            sources=[
                SourceRanking(
                    source="helpful", pairs=1452, ranking_accuracy=0.5937, mean_ranking_margin=4.44
                ),
                SourceRanking(source=None, pairs=503, ranking_accuracy=0.5487, mean_ranking_margin=-0.04),
            ],
        ),
    )


@pytest.fixture
def draw(tmp_path):
    def drawn(audit):
        write_check_page(audit, tmp_path / "check.html")
        return Page((tmp_path / "check.html").read_text(encoding="utf-8"))

    return drawn


def changed(**values):
    return full_audit().model_copy(update=values)


def test_every_number_of_the_record_is_shown(draw):
    page = draw(full_audit())
    for words in (
        "2,006 pairs in 18 files",
        "27 bad rows",
        "4 kinds of problem: 1 error, 2 warnings, 1 note",
        "65.4% of 1,951 pairs of unequal length",
        "55 are equally long",
        "62 · 43 · 36 tokens in the median prompt, chosen, rejected",
        "a.jsonl prompt, chosen, rejected 1 1,101 3",
        "b/ HH-RLHF transcripts 17 905 24",
        "prompt 71.2 62 140 170 250 3,100",
        "chosen 1,050 43 91 111 203 907",
        "rejected 38.8 36 82 99 188 1,905",
        "prompt + longer completion 128 119 241 283 500 4,021",
        "256 1,003 50.0% 602 30.0% 401 20.0% prompt_too_long 351 empty_completion 50",
        "1,024 2,001 99.8% 5 0.2% 0 0.0%",
        "helpful 1,500 1,401 13 19 71.2% 64 46 37",
        "(none) 506 477 8 0 – 58 39 35",
        "3,971 distinct ones",
        "512,345 with --max-length 1024",
        "1,234 GB in 6 shards",
        "7,241,732,096 parameters",
        "0.378",
        "40% of an accelerator's peak",
        "58.2% ranking accuracy [56.1 to 60.3%]: share of 1,955 pairs whose chosen completion is likelier",
        "61.6% ranking accuracy per token",
        "+3.3 nats: the median ranking margin",
        "nats −1,203.4 −12.6 +3.3 +18.3 +64.9",
        "helpful 1,452 59.4% +4.4",
        "(none) 503 54.9% 0.0",
        "row 1,777",
        "−2,345.7 nats",
        "Chosen, 801 tokens hard chosen",
        "Rejected, 1 token hard rejected",
    ):
        assert words in page.text, words


def test_problems_come_in_the_given_order_with_all_they_say(draw):
    audit = full_audit()
    page = draw(audit)
    places = [page.text.index(p.title) for p in audit.problems]
    assert places == sorted(places)
    for p in audit.problems:
        assert f"{p.title} {p.kind}" in page.text
        assert p.why in page.text
        for example in p.examples:
            assert example.where in page.text
            assert example.detail in page.text
    severities = [v.split()[-1] for v in page.values("span", "class") if v.startswith("badge")]
    assert severities == ["error", "warning", "warning", "note-severity"]
    assert page.tags.count("details") == 1
    assert "2 more of 27" in page.text
    assert "2 of 1,234 shown" in page.text


def test_commands_of_a_fix_are_code_and_its_words_are_not(draw, tmp_path):
    draw(full_audit())
    text = (tmp_path / "check.html").read_text()
    assert "drop them: <code>dpo-opt convert a.jsonl</code>, then go on" in text
    assert "<code>dpo-opt convert DATA</code>" in text


def test_a_fix_in_words_is_no_code(draw, tmp_path):
    draw(changed(problems=[problem(fix="remove the rows, or add the missing text")]))
    assert "<p>remove the rows, or add the missing text</p>" in (tmp_path / "check.html").read_text()


def test_refused_data_is_said_to_be(draw):
    assert "A later command would refuse this data." in draw(full_audit()).text
    assert "would refuse" not in draw(changed(problems=[problem(severity="warning")])).text


def test_bars_are_as_long_as_the_numbers_say(draw):
    page = draw(full_audit())
    drawn = [v for v in page.values("rect", "width") if v != "100%"]
    widths = [float(v.rstrip("%")) for v in drawn]
    scale = 500 / 100
    # Each row's p99, p90 and p50 against the longest p99.
    assert widths[:3] == pytest.approx([250 / scale, 140 / scale, 62 / scale], abs=0.01)
    # The longest p99 is a bar of 100%.
    assert widths[10:14] == pytest.approx(
        [241 / scale, 119 / scale, 100 * 1003 / 2006, 100 * 602 / 2006], abs=0.01
    )
    starts = [float(v.rstrip("%")) for v in page.values("rect", "x")]
    assert starts[:3] == pytest.approx([0, 50.0, 100 * 1605 / 2006], abs=0.01)
    assert all(0 <= value <= 100 for value in widths + starts)


def test_page_has_no_script_and_reaches_for_nothing(draw, tmp_path):
    page = draw(full_audit())
    text = (tmp_path / "check.html").read_text()
    assert page.values("meta", "content")[0] == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    )
    assert not {"script", "iframe", "object", "embed", "link", "form", "base", "img", "a"} & set(page.tags)
    names = {name for _, name, _ in page.attributes}
    assert not {"href", "src", "xlink:href", "action", "data", "style"} & names
    assert not [name for name in names if name.startswith("on")]
    assert not re.search(r"@import|url\(|https?:", text)


def test_hostile_strings_are_shown_and_do_nothing(draw, tmp_path):
    audit = full_audit()
    bad = problem(kind=HOSTILE, title=HOSTILE, why=HOSTILE, fix=f"{HOSTILE} `{HOSTILE}`")
    bad.examples = [Example(where=HOSTILE, detail=HOSTILE)] * 4
    hard = audit.reference.hardest[0]
    texts = dict.fromkeys(("source", "prompt", "chosen", "rejected"), HOSTILE)
    reference = audit.reference.model_copy(
        update={
            "hardest": [hard.model_copy(update=texts)],
            "sources": [s.model_copy(update={"source": HOSTILE}) for s in audit.reference.sources],
        }
    )
    audit = changed(
        problems=[bad],
        data=[DataSource(name=HOSTILE, form=HOSTILE, files=1, pairs=1, bad_rows=0)],
        sources=[s.model_copy(update={"source": HOSTILE}) for s in audit.sources],
        truncation=[TruncationForecast(max_length=9, whole=1, cut=0, dropped={HOSTILE: 3})],
        estimate=audit.estimate.model_copy(update={"assumption": HOSTILE}),
        reference=reference,
    )
    page = draw(audit)
    text = (tmp_path / "check.html").read_text()
    assert not {"script", "img"} & set(page.tags)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
    # Title, data 2, problem 3, fix 2, examples 8, drop reason, sources 2, assumption, reference 6.
    assert page.text.count(SHOWN) == 26
    # Nothing of it left the text: outside of it no attribute was made.
    assert not [n for _, n, _ in page.attributes if n in ("onerror", "src")]


def test_parts_that_are_not_there_are_left_out_or_explained(draw):
    whole, bare = (
        draw(full_audit()),
        draw(
            changed(unit="characters", problems=[], sources=[], truncation=[], estimate=None, reference=None)
        ),
    )
    for heading in ("By source", "Effect of --max-length", "Cost of scoring"):
        assert heading in whole.text
        assert heading not in bare.text
    assert "No problem was found." in bare.text
    assert "0 kinds of problem" in bare.text
    assert "Lengths in characters" in bare.text
    assert "name a tokenizer: --model MODEL" in bare.text
    assert "--model MODEL" not in whole.text
    assert "Score the pairs with dpo-opt precompute" in bare.text
    assert "No problem was found." not in whole.text


def test_no_pair_at_all_can_be_drawn(draw):
    bias = LengthBias(longer_chosen=None, unequal_pairs=0, equal_pairs=0)
    page = draw(
        Audit(
            data=[],
            pairs=0,
            problems=[],
            unit="tokens",
            lengths=[],
            length_bias=bias,
            sources=[],
            truncation=[],
        )
    )
    assert "0 pairs in 0 files" in page.text
    assert "Lengths in tokens." in page.text
    empty = [Lengths(part="prompt", mean=0, p50=0, p90=0, p95=0, p99=0, longest=0)]
    none = [TruncationForecast(max_length=5, whole=0, cut=0, dropped={"prompt_too_long": 0})]
    assert "prompt_too_long" not in draw(changed(pairs=0, lengths=empty, truncation=none)).text


@pytest.mark.parametrize(
    ("values", "sides"),
    [
        ([-9, -3, 1, 3, 5], ["rejected-fill", "chosen-fill"]),
        ([1, 2, 3, 4, 5], ["chosen-fill"]),
        ([-5, -4, -3, -2, -1], ["rejected-fill"]),
        ([0, 0, 0, 0, 0], []),
        ([7, 7, 7, 7, 7], []),
    ],
)
def test_the_middle_half_of_the_margins_is_drawn_on_its_sides_of_zero(draw, tmp_path, values, sides):
    quantiles = dict(zip(("p5", "p25", "p50", "p75", "p95"), map(float, values), strict=True))
    reference = full_audit().reference.model_copy(update={"margin_quantiles": quantiles})
    draw(changed(reference=reference))
    text = (tmp_path / "check.html").read_text()
    (strip,) = re.findall(r'<svg class="strip".*?</svg>', text, re.DOTALL)
    page = Page(strip)
    assert [c for c in page.values("rect", "class") if c != "line-fill"] == sides
    ends = [page.values(tag, name) for tag, name in (("rect", "x"), ("line", "x1"), ("line", "x2"))]
    assert all(0 <= float(v.rstrip("%")) <= 100 for found in ends for v in found)
    if len(sides) == 2:
        low, high = -9, 5
        at = [3 + 94 * (v - low) / (high - low) for v in (-9, -3, 0)]
        assert [float(v.rstrip("%")) for v in ends[0]] == pytest.approx(at, abs=0.01)
        assert [float(v.rstrip("%")) for v in page.values("rect", "width")] == pytest.approx(
            [94, 94 * 3 / 14, 94 * 3 / 14], abs=0.01
        )


def test_one_prompt_is_said_to_have_no_interval(draw):
    nan = float("nan")
    reference = full_audit().reference.model_copy(update={"ranking_accuracy_interval": (nan, nan)})
    assert "58.2% ranking accuracy [one prompt: no interval]" in draw(changed(reference=reference)).text


def test_a_reference_read_from_shards_can_be_drawn(draw, tmp_path, shards_writer, texts):
    shards_writer(tmp_path / "s", texts(40, prompts=15))
    view = reference_view(tmp_path / "s")
    page = draw(changed(reference=view))
    assert "The 8 pairs hardest to flip" in page.text
    assert all(p.chosen in page.text for p in view.hardest)


def test_a_folder_is_not_overwritten(tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        write_check_page(full_audit(), tmp_path)
