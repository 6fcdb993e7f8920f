#!/usr/bin/env bash
# datasets 5.2.0: the same rows are two datasets. load_dataset("json") reads the arguments of tool calls, whose keys differ
# from row to row, as Json() and keeps them as they are. Dataset.from_list makes one struct of them: every call gets the
# arguments of all others, as None (as its documentation of lists of objects says), and a whole number becomes a fraction
# where another row has one. A chat template writes what it is given, here Qwen2.5's (from TRL 1.16.0), so a model is
# trained to call a tool with arguments that no row has. One would expect a file, and its lines read by json.loads, to
# give one text.
#
# Seen, with transformers 5.19.0 and tokenizers 0.23.3:
#   load_dataset: {"name": "weather", "arguments": {"city": "Rome", "days": 2}}
#   from_list:    {"name": "weather", "arguments": {"city": "Rome", "days": 2.0, "zone": null}}
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q datasets==5.2.0 transformers==5.19.0 tokenizers==0.23.3 jinja2
"$work/venv/bin/pip" install -q --no-deps --target "$work/trl" trl==1.16.0
HF_HUB_OFFLINE=1 HF_HOME="$work/cache" "$work/venv/bin/python" - "$work" <<'PY'
import json
import pathlib
import sys

from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

work = pathlib.Path(sys.argv[1])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="<|im_end|>")
tokenizer.chat_template = (work / "trl" / "trl" / "chat_templates" / "qwen2_5.jinja").read_text(encoding="utf-8")


def calling(name, arguments):
    call = {"type": "function", "function": {"name": name, "arguments": arguments}}
    asked = {"role": "user", "content": "Please look."}
    return {"messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}]}


rows = [calling("weather", {"city": "Rome", "days": 2}), calling("clock", {"zone": "UTC", "days": 0.5})]
(work / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
read = {
    "load_dataset": load_dataset("json", data_files=str(work / "rows.jsonl"), split="train"),
    "from_list": Dataset.from_list([json.loads(line) for line in (work / "rows.jsonl").open()]),
}
written = {}
for name, dataset in read.items():
    text = tokenizer.apply_chat_template(dataset[0]["messages"], tokenize=False)
    written[name] = text.partition("<tool_call>\n")[2].partition("\n</tool_call>")[0]
    print(f"{name + ':':13} {written[name]}")
assert json.loads(written["load_dataset"])["arguments"] == {"city": "Rome", "days": 2}
assert '"days": 2}' in written["load_dataset"]
assert json.loads(written["from_list"])["arguments"] == {"city": "Rome", "days": 2.0, "zone": None}
assert '"days": 2.0' in written["from_list"]
PY
