"""All sides of a benchmark read reviews without markup."""

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.reviews import read, sample


def test_a_sample_has_no_markup_and_keeps_the_text(tmp_path):
    reviews = ["Good.<br /><br />Very good.", "I <i>love</i> it, 3 < 4 <3", "plain"]
    pq.write_table(pa.table({"text": reviews, "label": [1, 1, 0]}), tmp_path / "train.parquet")
    cleaned = ["Good. Very good.", "I love it, 3 < 4 <3", "plain"]
    assert read(tmp_path / "train.parquet") == cleaned
    written = sample(tmp_path / "train.parquet", 3, tmp_path / "sample.parquet")
    assert sorted(pq.read_table(written)["text"].to_pylist()) == sorted(cleaned)


def test_the_same_reviews_are_drawn_each_time(tmp_path):
    pq.write_table(pa.table({"text": [f"review {i}" for i in range(100)]}), tmp_path / "train.parquet")
    first, second = (sample(tmp_path / "train.parquet", 5, tmp_path / name) for name in ("a", "b"))
    assert pq.read_table(first).equals(pq.read_table(second))
