"""Replay of recorded traffic: the real sample traces, every format's quirks, and files that must be refused."""

from __future__ import annotations

import gzip
import json
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from test_workload import drain, facts

from kvsim.errors import InputError
from kvsim.requests import Request, RequestSource
from kvsim.units import PS_PER_S, ps
from kvsim.workload import WorkloadConfig, build_source, expected_num_requests

SAMPLES = Path(__file__).resolve().parents[2] / "shared" / "traces"
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"the sample traces are not at {SAMPLES}")

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
PLAIN = "arrival_s,prompt_tokens,output_tokens\n"


def trace(path: str, format_name: str, **more: object) -> WorkloadConfig:
    return WorkloadConfig.model_validate({"trace": {"path": path, "format": format_name, **more}})


def replay(folder: Path, path: str, format_name: str, **more: object) -> list[Request]:
    return drain(build_source(trace(path, format_name, **more), folder))


def times_s(requests: list[Request]) -> list[float]:
    return [request.arrival_ps / PS_PER_S for request in requests]


def mean_lengths(requests: list[Request]) -> tuple[int, int]:
    return tuple(np.rint(np.mean([(item.prompt_tokens, item.output_tokens) for item in requests], axis=0)).astype(int))


# --- the sample traces


@needs_samples
def test_azure_trace_and_its_plain_copy_are_the_same_requests() -> None:
    original = replay(SAMPLES, "AzureLLMInferenceTrace_conv.csv", "azure")
    assert len(original) == 19_366 and mean_lengths(original) == (1155, 211)
    assert original[1].arrival_ps == 4_314_579_000_000
    assert facts(original) == facts(replay(SAMPLES, "azure2023_conv.csv", "csv"))


@needs_samples
def test_mooncake_trace() -> None:
    source = build_source(trace("mooncake_conversation_trace.jsonl", "mooncake"), SAMPLES)
    assert source.hash_block_tokens == 512
    requests = drain(source)
    assert len(requests) == 12_031 and mean_lengths(requests) == (12_035, 343)
    assert requests[-1].arrival_ps == 3_536_999 * PS_PER_S // 1000
    seen: set[int] = set()
    hits = total = 0
    for request in requests:
        assert len(request.prefix_hashes) == -(-request.prompt_tokens // 512)
        hits += sum(item in seen for item in request.prefix_hashes)
        total += len(request.prefix_hashes)
        seen.update(request.prefix_hashes)
    assert round(hits / total, 3) == 0.366  # of blocks, in an infinite cache; from the traces' README


@needs_samples
def test_a_trace_repeated_keeps_its_rate() -> None:
    config = trace("AzureLLMInferenceTrace_conv.csv", "azure", repeat=6, limit=100_000, rate_scale=2.0)
    requests = drain(build_source(config, SAMPLES))
    assert len(requests) == expected_num_requests(config) == 100_000
    assert [request.index for request in requests] == list(range(100_000))
    rate_per_s = 100_000 / (requests[-1].arrival_ps / PS_PER_S)
    assert abs(rate_per_s - 2 * 5.5304) < 0.02 * rate_per_s  # the last copy is cut within an hour that is not even
    assert requests[19_366].prompt_tokens == requests[0].prompt_tokens


# --- what the options do


@pytest.fixture
def small(tmp_path: Path) -> Path:
    rows = "".join(f"{second}.5,{100 + second},{10 + second}\n" for second in (1, 2, 4, 8))
    (tmp_path / "small.csv").write_text(PLAIN + rows)
    return tmp_path


def test_plain_times_are_taken_as_they_are(small: Path) -> None:
    assert times_s(replay(small, "small.csv", "csv")) == [1.5, 2.5, 4.5, 8.5]


def test_start_rate_and_limit(small: Path) -> None:
    assert times_s(replay(small, "small.csv", "csv", start_s=2.5)) == [0, 2, 6]
    assert times_s(replay(small, "small.csv", "csv", start_s=2.0, rate_scale=2.0, limit=2)) == [0.25, 1.25]
    assert replay(small, "small.csv", "csv", start_s=2.0)[0].prompt_tokens == 102


def test_repeat_shifts_by_span_and_one_mean_gap(small: Path) -> None:
    requests = replay(small, "small.csv", "csv", repeat=3, limit=10)
    period_s = 7 * 4 / 3
    expected = [time_s + copy * period_s for copy in range(3) for time_s in (1.5, 2.5, 4.5, 8.5)][:10]
    assert times_s(requests) == pytest.approx(expected, abs=3e-12)  # the period is a whole number of picoseconds
    # One period after another is the same rate: 4 requests per period.
    assert requests[4].prompt_tokens == 101 and requests[9].index == 9


def test_repeated_prefixes_hit_within_a_copy_only(tmp_path: Path) -> None:
    rows = [{"timestamp": 1000 * i, "input_length": 600, "output_length": 5, "hash_ids": [0, i]} for i in range(3)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests = replay(tmp_path, "t.jsonl", "mooncake", repeat=2)
    assert [request.prefix_hashes for request in requests] == [(0, 0), (0, 1), (0, 2), (3, 3), (3, 4), (3, 5)]
    assert times_s(requests) == [0, 1, 2, 3, 4, 5]


def test_azure_starts_at_its_first_row_and_crosses_midnight(tmp_path: Path) -> None:
    rows = ("2023-11-16 23:59:59.9999999,10,1\n", "2023-11-17 00:00:00.0000001,11,2\n", "2023-11-18 00:00:00,12,3\n")
    (tmp_path / "t.csv").write_text(AZURE + "".join(rows))
    requests = replay(tmp_path, "t.csv", "azure")
    assert [request.arrival_ps for request in requests] == [0, 200_000, ps(86_400) + 100_000]
    zones = (
        "2024-05-10 00:00:00.009930+00:00,10,1\n",
        "2024-05-10 02:30:01+02:30,11,2\n",
        "2024-05-09 19:00:02-05:00,12,3\n",
    )
    (tmp_path / "zones.csv").write_text(AZURE + "".join(zones))
    assert times_s(replay(tmp_path, "zones.csv", "azure")) == pytest.approx([0, 0.99007, 1.99007], abs=1e-12)


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("quote", ["", '"'])
def test_encodings_of_the_same_table(tmp_path: Path, gzipped: bool, mark: str, newline: str, quote: str) -> None:
    header = ",".join(quote + name + quote for name in ("output_tokens", "arrival_s", "note", "prompt_tokens"))
    text = mark + newline.join([header, '3,0.25,"a, b",7', "4.0,1e0,,8", "", ""])
    raw = text.encode()
    (tmp_path / "t.csv").write_bytes(gzip.compress(raw) if gzipped else raw)
    requests = replay(tmp_path, "t.csv", "csv")
    assert [(item.arrival_ps, item.prompt_tokens, item.output_tokens) for item in requests] == [
        (PS_PER_S // 4, 7, 3),
        (PS_PER_S, 8, 4),
    ]


def test_csv_and_jsonl_give_the_same_requests_with_prefixes(tmp_path: Path) -> None:
    columns = ("arrival_s", "prompt_tokens", "output_tokens", "cached_prompt_tokens", "prefix_hashes")
    rows = [(3501.721937, 33, 4, 16, [5, 6, 7]), (1e4 + 1e-9, 20, 1, 0, []), (123456.789012345678, 16, 2, 16, [5])]
    table = [",".join(columns)]
    table += [",".join([*map(repr, row[:4]), " ".join(map(str, row[4]))]) for row in rows]
    (tmp_path / "t.csv").write_text("\n".join(table))
    (tmp_path / "t.jsonl").write_text("\n\n".join(json.dumps(dict(zip(columns, row, strict=True))) for row in rows))
    requests = replay(tmp_path, "t.csv", "csv", hash_block_tokens=16)
    assert facts(requests) == facts(replay(tmp_path, "t.jsonl", "jsonl", hash_block_tokens=16))
    assert [request.prefix_hashes for request in requests] == [(5, 6, 7), (), (5,)]
    assert requests[0].arrival_ps == 3_501_721_937_000_000 and requests[0].cached_prompt_tokens == 16
    with pytest.raises(InputError, match=r"workload\.trace\.hash_block_tokens must be given, because line 2"):
        replay(tmp_path, "t.csv", "csv")


def test_skipped_rows_are_counted_and_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(PLAIN + "0,10,0\n1,10,5\nx,10,5\n2,0,5\n3,10,6\n4,1\n")
    source = build_source_with_warning(trace("t.csv", "csv", skip_invalid=True, repeat=2), tmp_path)
    assert [request.output_tokens for request in drain(source)] == [5, 6, 5, 6]
    (note,) = source.notes()
    assert note.startswith("4 rows of t.csv skipped as invalid; the first: t.csv:2 output_tokens='0' must be")
    (tmp_path / "fine.csv").write_text(PLAIN + "1,10,5\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fine = build_source(trace("fine.csv", "csv", skip_invalid=True), tmp_path)
    assert fine.notes() == []


def build_source_with_warning(config: WorkloadConfig, folder: Path) -> RequestSource:
    with pytest.warns(UserWarning, match="skip_invalid leaves out t.csv:2"):
        return build_source(config, folder)


# --- files to refuse

MOONCAKE = '{"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [1, 2]}\n'
BAD = [
    # format, content, what the message must say
    ("csv", "", "must have at least one row; the file is empty"),
    ("csv", "\n \n", "the file is empty"),
    ("csv", PLAIN, "must have at least one usable row; check the file"),
    (
        "csv",
        PLAIN + "0,10,5\n1,ten,5\n",
        "t:3 prompt_tokens='ten' must be a whole number from 1 to 2,147,483,647; correct",
    ),
    ("csv", PLAIN + "0,10,5\n1,10\n", "t:3 row='1,10' must have 3 values, has 2"),
    ("csv", PLAIN + "0,10,5,9\n", "t:2 row='0,10,5,9' must have 3 values, has 4"),
    ("csv", PLAIN + "0,10,0\n", "t:2 output_tokens='0' must be"),
    ("csv", PLAIN + "0,0,1\n", "set workload.trace.skip_invalid: true"),
    ("csv", PLAIN + "0,-3,1\n", "t:2 prompt_tokens='-3' must be"),
    ("csv", PLAIN + "0,nan,1\n", "t:2 prompt_tokens='nan' must be"),
    ("csv", PLAIN + "0,inf,1\n", "t:2 prompt_tokens='inf' must be"),
    ("csv", PLAIN + "0,1e999999,1\n", "t:2 prompt_tokens='1e999999' must be"),
    ("csv", PLAIN + "0,1.5,1\n", "t:2 prompt_tokens='1.5' must be"),
    ("csv", PLAIN + "0,,1\n", "t:2 prompt_tokens='' must be"),
    ("csv", PLAIN + "nan,1,1\n", "t:2 arrival_s='nan' must be seconds since the start of the trace"),
    ("csv", PLAIN + "inf,1,1\n", "t:2 arrival_s='inf' must be"),
    ("csv", PLAIN + "-1,1,1\n", "t:2 arrival_s='-1' must be"),
    ("csv", PLAIN + "1700000000,1,1\n", "t:2 arrival_s='1700000000' must be"),
    (
        "csv",
        PLAIN + "1,1,1\n\n0.5,1,1\n",
        "t:4 arrival_s=0.5 must not go back in time, from 1 s in the row above; sort",
    ),
    ("csv", PLAIN + '0,10,"5\n1,10,5\n', "(line 2: unexpected end of data)"),
    ("csv", PLAIN + '0,10,5\n0,10,"5\n1,10,5\n1,10,"5\n', "(line 3: "),
    ("csv", PLAIN + '0,10,"5\n1,10,5\n1,10,"\n', "(line 2: a quote that is not closed)"),
    ("csv", PLAIN + "0,10," + "5" * 200_000, "(line 2: field larger than field limit"),
    (
        "csv",
        "arrival_s,prompt_tokens\n0,1\n",
        "columns arrival_s, prompt_tokens, output_tokens; found arrival_s, prompt",
    ),
    ("csv", "arrival_s;prompt_tokens;output_tokens\n0;1;1\n", "found arrival_s;prompt_tokens;output_tokens"),
    ("csv", "arrival_s,arrival_s,prompt_tokens,output_tokens\n0,0,1,1\n", "line 1: column arrival_s appears twice"),
    (
        "csv",
        PLAIN[:-1] + ",cached_prompt_tokens\n0,10,5,11\n",
        "cached_prompt_tokens=11 must be at most prompt_tokens=10",
    ),
    ("csv", PLAIN[:-1] + ",prefix_hashes\n0,10,5,1 b\n", "t:2 prefix_hashes='1 b' must be whole numbers"),
    ("csv", AZURE + "2023-11-16 18:15:46.6,1,1\n", "workload.trace.format='csv' must be a CSV file"),
    ("csv", AZURE + "2023-11-16 18:15:46.6,1,1\n", "try format: azure"),
    ("csv", MOONCAKE, "try format: mooncake"),
    ("azure", PLAIN + "0,1,1\n", "try format: csv"),
    ("azure", AZURE + "2023-11-16 18:15:66.6,1,1\n", "t:2 TIMESTAMP='2023-11-16 18:15:66.6' must be a date and time"),
    ("azure", AZURE + "2023-02-30 18:15:06.6,1,1\n", "must be a date and time"),
    ("azure", AZURE + "46.6,1,1\n", "must be a date and time"),
    (
        "azure",
        AZURE + "2023-11-16 18:15:46,1,1\n2023-11-16 18:15:45.5,1,1\n",
        "t:3 TIMESTAMP=-0.5 must not go back in time",
    ),
    (
        "mooncake",
        PLAIN + "0,1,1\n",
        "must be JSON lines with keys timestamp, input_length, output_length; found arrival_s",
    ),
    ("mooncake", '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}', "try format: jsonl"),
    ("mooncake", '{"timestamp": 0, "input', "t:1 row="),
    ("mooncake", MOONCAKE + '{"timestamp": 1', "t:2 row='{\"timestamp\": 1' must be a JSON object on one line"),
    ("mooncake", MOONCAKE + "[1, 2]\n", "t:2 row='[1, 2]' must be a JSON object"),
    ("mooncake", MOONCAKE + '{"timestamp": 1, "output_length": 3}', "t:2 input_length='nothing' must be"),
    ("mooncake", MOONCAKE.replace("600", "true"), "t:1 input_length=true must be"),
    ("mooncake", MOONCAKE.replace("600", "NaN"), "t:1 input_length=nan must be"),
    ("mooncake", MOONCAKE.replace(": 0", ": -Infinity"), "t:1 timestamp=-inf must be milliseconds"),
    ("mooncake", MOONCAKE.replace("[1, 2]", "[1, 2.5]"), "t:1 hash_ids="),
    ("mooncake", MOONCAKE.replace("[1, 2]", "7"), "t:1 hash_ids=7 must be"),
    ("mooncake", MOONCAKE.replace("[1, 2]", "[1, 2, 3]"), "t:1 number of hash_ids=3 must be at most one per 512"),
]


@pytest.mark.parametrize("format_name, text, says", BAD, ids=range(len(BAD)))
def test_bad_files_are_refused(tmp_path: Path, format_name: str, text: str, says: str) -> None:
    (tmp_path / "t").write_text(text)
    with pytest.raises(InputError) as error:
        replay(tmp_path, "t", format_name)
    assert says in str(error.value)
    assert error.value.rule.startswith("must") and error.value.fix


def test_files_that_cannot_be_opened_or_read(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "latin").write_bytes(PLAIN.encode() + b"0,1,1\n1,\xe9,1\n")
    whole = gzip.compress((PLAIN + "".join(f"{i},1,{i + 1}\n" for i in range(50_000))).encode())
    (tmp_path / "cut.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "spoilt.gz").write_bytes(whole[:5000] + bytes(2000) + whole[7000:])
    for name, says in {
        "absent.csv": f"nothing at {tmp_path / 'absent.csv'}",
        "folder": "must be a readable file",
        "latin": "must be UTF-8",
        "cut.gz": "must be a readable file",
    }.items():
        with pytest.raises(InputError) as error:
            replay(tmp_path, name, "csv")
        assert error.value.field == "workload.trace.path" and says in str(error.value)
    with pytest.raises(InputError):
        replay(tmp_path, "spoilt.gz", "csv")


def test_options_that_leave_nothing(small: Path) -> None:
    with pytest.raises(InputError, match=r"at least one usable row from start_s=100 on; start earlier"):
        replay(small, "small.csv", "csv", start_s=100.0)
    (small / "one.csv").write_text(PLAIN + "0,1,1\n")
    with pytest.raises(InputError, match=r"workload.trace.repeat=2 must be 1 for a trace of one request"):
        replay(small, "one.csv", "csv", repeat=2)


def test_a_long_trace_is_never_whole_in_memory(tmp_path: Path) -> None:
    with (tmp_path / "long.csv").open("w") as file:
        file.write(PLAIN)
        file.writelines(f"{index * 0.01:.2f},{index % 4000 + 1},200\n" for index in range(300_000))
    tracemalloc.start()  # slows reading tenfold: only the start and the last sixth are watched
    source = build_source(trace("long.csv", "csv"), tmp_path)
    start_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    taken = [source.take().index for _ in range(250_000)]
    tracemalloc.start()
    while source.next_arrival_ps is not None:
        taken[-1] = source.take().index
    end_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken[-1] == 299_999
    assert start_bytes < 1_000_000 and end_bytes < 1_000_000  # the last 50,000 requests held would be 7 MB
