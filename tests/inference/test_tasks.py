"""Tasks of local files: what is read, and what is counted."""

import json
import math

import pytest

from megagap.errors import DataError
from megagap.inference.continuations import Score
from megagap.inference.tasks import evaluate_task, read_tasks, task_numbers


class KnownScores:
    """A stand-in for a model: the nats of each text are given."""

    def __init__(self, nats: dict[str, float]) -> None:
        self.nats = nats

    def score(self, asked, progress):
        return [Score(self.nats[text], self.nats[text] < 1, 1) for _, text in asked]


def write(path, *lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return path


def test_the_likeliest_choice_is_taken_and_per_byte_the_one_whose_bytes_are_likeliest(tmp_path):
    file = write(
        tmp_path / "quiz.jsonl",
        {"question": "Who?", "choices": ["me", "the others"], "answer": 1},
        "\n",
        {"prompt": "Where? ", "choices": ["here", "là", "nowhere"], "answer": 0},
    )
    (task,) = read_tasks([file])
    assert task.asked() == [
        ("Who?", " me"), ("Who?", " the others"), ("Where? ", "here"), ("Where? ", "là"), ("Where? ", "nowhere"),
    ]  # fmt: skip
    # By bytes: 2.0 and 0.5; 0.75, 0.9 / 3 = 0.3 (à has two), 1.4.
    scores = {" me": 4.0, " the others": 5.0, "here": 3.0, "là": 0.9, "nowhere": 9.8}
    found = evaluate_task(task, KnownScores(scores))
    assert (found["kind"], task.name, task.texts) == ("multiple_choice", "quiz", 5)
    assert found["accuracy"]["value"] == 0 and found["accuracy_bytes"]["value"] == 0.5
    assert found["accuracy"]["cases"] == 2 and found["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert found["bits_per_byte"] == pytest.approx((5.0 + 3.0) / math.log(2) / len(" the others here"))


def test_a_completion_is_exact_if_it_is_the_greedy_one(tmp_path):
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "c"}]
    (task,) = read_tasks([write(tmp_path / "phrases.jsonl", *lines)])
    found = evaluate_task(task, KnownScores({" b": 0.5, "c": 2.5}))
    assert found["exact"]["value"] == 0.5 and found["nats"]["value"] == 1.5
    assert found["bits_per_byte"] == pytest.approx(3.0 / math.log(2) / len(" bc"))


def test_a_run_records_the_same_values_and_none_of_a_task_with_a_score_that_is_not_finite(tmp_path):
    lines = [{"prompt": "a", "completion": "b"}, {"prompt": "", "completion": "c"}]
    (task,) = read_tasks([write(tmp_path / "phrases.jsonl", *lines)])
    model = KnownScores({" b": 0.5, "c": 2.5})
    found, scores = evaluate_task(task, model), model.score(task.asked(), None)
    assert task_numbers(task, scores) == {
        "task_exact/phrases": found["exact"]["value"],
        "task_nats/phrases": found["nats"]["value"],
        "task_bpb/phrases": found["bits_per_byte"],
    }
    for bad in (math.nan, math.inf):
        numbers = task_numbers(task, [scores[0], Score(bad, True, 1)])
        assert len(numbers) == 3 and all(map(math.isnan, numbers.values()))


def test_all_faults_of_all_files_are_told_at_once(tmp_path):
    line = {"prompt": "a", "completion": "b"}
    files = [
        write(tmp_path / "a.jsonl", line, "{\n", line, "[]\n"),
        tmp_path / "none.jsonl",
        write(tmp_path / "b.jsonl"),
    ]
    with pytest.raises(DataError) as error:
        read_tasks(files)
    told = str(error.value)
    assert told.startswith("data error: 4 faults in task files\n")
    for said in ("a.jsonl, line 2: not valid", "a.jsonl, line 4: not a JSON", "none.jsonl: ", "b.jsonl has no lines"):
        assert said in told


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: not valid JSON at character 2"),
        ("[1]", "line 2: not a JSON object"),
        ('{"a": 1}', "line 2: has neither 'choices' nor 'completion'; it has 'a'"),
        ('{"question": "q", "choices": ["a", "b"]}', "line 2: has no 'answer'"),
        (
            '{"question": "q", "choices": ["a", "b"], "answer": 2}',
            "line 2: 'answer' is 2, not the number of a choice",
        ),
        ('{"question": "q", "choices": ["a", "b"], "answer": true}', "line 2: 'answer' is true, not"),
        ('{"question": "q", "choices": ["a"], "answer": 0}', "line 2: 'choices' should be a list of at least two"),
        ('{"question": "q", "choices": ["a", 3], "answer": 0}', "line 2: 'choices', number 1 is 3, not a text"),
        ('{"question": "q", "choices": ["a", "a"], "answer": 0}', "line 2: 'choices' has the same text twice"),
        ('{"choices": ["a", "b"], "answer": 0}', "line 2: has no 'prompt'"),
        ('{"question": "q", "choices": "ab", "answer": 0}', "line 2: 'choices' should be a list"),
        ('{"prompt": "p", "prompt": "q", "completion": "c"}', "line 2: has 'prompt' twice"),
        ('{"prompt": "p", "question": "q", "choices": ["a", "b"], "answer": 0}', "has both 'question' and 'prompt'"),
        ('{"question": "q", "choices": ["a", "b"], "answer": 0, "completion": "c"}', "both 'choices' and 'completion'"),
        ('{"prompt": "p", "completion": " "}', "line 2: 'completion' is blank"),
        ('{"prompt": "p", "completion": "\\ud800"}', "line 2: 'completion' is not valid text"),
        ('{"prompt": "p", "completion": "c"}', "line 2: is completion, the lines before are multiple choice"),
    ],
)
def test_a_bad_line_is_named_with_its_file_and_field(tmp_path, line, said):
    first = {"question": "q", "choices": ["a", "b"], "answer": 0}
    file = write(tmp_path / "quiz.jsonl", first, line)
    with pytest.raises(DataError) as error:
        read_tasks([file])
    assert str(error.value).startswith(f"data error: {file}, line 2: ") and said in str(error.value)


def test_files_that_are_empty_missing_or_of_one_name_are_refused(tmp_path):
    with pytest.raises(DataError, match="has no lines"):
        read_tasks([write(tmp_path / "a.jsonl", "\n")])
    with pytest.raises(DataError, match="cannot read"):
        read_tasks([tmp_path / "b.jsonl"])
    (tmp_path / "more").mkdir()
    line = {"prompt": "a", "completion": "b"}
    with pytest.raises(DataError, match="two task files are called c"):
        read_tasks([write(tmp_path / "c.jsonl", line), write(tmp_path / "more/c.jsonl", line)])
