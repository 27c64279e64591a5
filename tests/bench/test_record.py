"""The results file: readable, whole, and never a mixture of circumstances."""

import json
from dataclasses import replace

import pytest
from opacus_bpclip.bench.record import Record, circumstances

from opacus_bpclip.bench import record as records
from opacus_bpclip.bench.settings import Settings
from opacus_bpclip.jobs.errors import UsageError
from tests.bench.tiny import CIRCUMSTANCES, CNN, CURVE, arm, comparison, record


def test_a_written_record_is_read_again(tmp_path):
    path = tmp_path / "r.json"
    whole = record(CNN, *CURVE)
    records.write(whole, path)
    assert records.read(path) == whole
    assert '"seconds": [ 1.0, 2.0, 4.0 ]' in path.read_text()


def test_a_record_without_results_is_read_again(tmp_path):
    records.write(Record(), tmp_path / "r.json")
    assert records.read(tmp_path / "r.json") == Record()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 1}', '{"format": 2}'])
def test_another_file_is_refused(text, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        records.read(path)
    assert str(caught.value).startswith(f"{path} is not a results file of opacus-bpclip bench (")


def test_a_point_measured_again_takes_the_old_ones_place():
    new = comparison("cnn26k", arm("non-private", [1.0, 1.0]))
    assert record(CNN, *CURVE).with_comparison(new).comparisons == (new, *CURVE)
    assert record(CNN).with_comparison(CURVE[0]).comparisons == (CNN, CURVE[0])


def test_results_of_other_circumstances_are_not_added_to():
    other = replace(CIRCUMSTANCES, threads=2, hardware="another CPU")
    assert records.continued(record(CNN), CIRCUMSTANCES) == record(CNN)
    assert records.continued(Record(), other) == Record(other)
    with pytest.raises(UsageError) as caught:
        records.continued(record(CNN), other)
    assert str(caught.value) == (
        "cannot add to the results in --from-json: threads 1 there, 2 now; hardware a CPU there, "
        "another CPU now"
    )


def test_circumstances_are_json():
    now = circumstances(Settings(threads=2))
    assert (now.threads, now.device) == (2, "cpu")
    assert now.hardware
    assert set(now.versions) == {"python", "torch", "opacus", "opacus_bpclip"}
    assert json.loads(json.dumps(vars(now))) == vars(now)
