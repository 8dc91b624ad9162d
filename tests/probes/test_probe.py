"""The kNN probe on real archives: against scikit-learn, its splits, its notes, its refusals."""

import json

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score, confusion_matrix, roc_auc_score
from sklearn.neighbors import KNeighborsClassifier

from patchmill.errors import UsageError
from patchmill.probes import probe_knn


def clouds(random, labels, spread=1.2):
    """A vector per label: classes are noisy directions."""
    return np.eye(8)[list(labels)] + spread * random.standard_normal((len(labels), 8)) / 8**0.5


def halves(vectors):
    """As the archive keeps them."""
    return np.asarray(vectors).astype(np.float16).astype(np.float64)


@pytest.mark.parametrize("classes", [2, 3])
def test_leaving_one_group_out_equals_scikit_learn(slides, classes):
    random = np.random.default_rng(classes)
    lines, vectors, labels, groups = ["source,row,label"], [], [], []
    for number in range(4):
        truth = random.integers(0, classes, 30)
        given = clouds(random, truth)
        slides.add(f"s{number}.svs", given)
        lines += [f"s{number}.svs,{row},class-{label}" for row, label in enumerate(truth)]
        vectors.append(halves(given))
        labels.append(truth)
        groups.append(np.full(30, number))
    vectors, labels, groups = (np.concatenate(part) for part in (vectors, labels, groups))
    report = probe_knn(slides.archive, slides.csv(*lines), ks=(1, 10, 20))
    assert (report.tiles, report.sources, report.train, report.test) == (120, 4, 120, 120)
    assert report.split == "leave one of 4 groups out"
    assert report.notes == ()
    assert report.counts == {f"class-{c}": int((labels == c).sum()) for c in range(classes)}
    for result in report.results:
        share, majority = np.empty((120, classes)), np.empty(120, int)
        for group in range(4):
            out = groups == group
            oracle = KNeighborsClassifier(
                result.k, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine", algorithm="brute"
            ).fit(vectors[~out], labels[~out])
            share[out] = oracle.predict_proba(vectors[out])
            majority[out] = np.bincount(labels[~out]).argmax()
        answer = share.argmax(axis=1)
        found = result.tiles
        assert found.accuracy.value == pytest.approx(accuracy_score(labels, answer))
        assert found.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(labels, answer))
        ranked = share[:, 1] if classes == 2 else share
        assert found.auroc.value == pytest.approx(roc_auc_score(labels, ranked, multi_class="ovr"), abs=1e-6)
        assert np.array_equal(found.confusion, confusion_matrix(labels, answer))
        assert found.accuracy.baseline == pytest.approx(accuracy_score(labels, majority))
        assert found.accuracy.value > found.accuracy.baseline
        assert result.sources is None


def test_labels_of_sources_judge_tiles_and_sources(slides):
    random = np.random.default_rng(4)
    truth = [0, 1, 0, 1, 0, 1]
    counts = [5 + 8 * number for number in range(6)]
    vectors = [halves(clouds(random, [label] * count, 2.0)) for label, count in zip(truth, counts, strict=True)]
    for number, given in enumerate(vectors):
        slides.add(f"s{number}.svs", given)
    path = slides.csv("source,label", *(f"s{number}.svs,{label}" for number, label in enumerate(truth)))
    report = probe_knn(slides.archive, path, ks=(20,))
    assert report.labels_of == "sources"
    shares = []
    for number in range(6):
        rest = [i for i in range(6) if i != number]
        oracle = KNeighborsClassifier(
            20, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine", algorithm="brute"
        ).fit(
            np.concatenate([vectors[i] for i in rest]), np.repeat([truth[i] for i in rest], [counts[i] for i in rest])
        )
        shares.append(oracle.predict_proba(vectors[number]))
    (result,) = report.results
    tiles = np.concatenate(shares)
    assert result.tiles.auroc.value == pytest.approx(roc_auc_score(np.repeat(truth, counts), tiles[:, 1]), abs=1e-6)
    means = np.stack([share.mean(axis=0) for share in shares])
    assert result.sources.accuracy.value == pytest.approx(accuracy_score(truth, means.argmax(axis=1)))
    assert result.sources.auroc.value == pytest.approx(roc_auc_score(truth, means[:, 1]))
    assert np.sum(result.sources.confusion) == 6


def test_given_train_and_test_are_kept(slides):
    random = np.random.default_rng(5)
    truth = random.integers(0, 2, 60)
    given = clouds(random, truth)
    slides.add("s.svs", given)
    sides = ["train"] * 40 + ["test"] * 20
    lines = [f"s.svs,{row},{label},{side}" for row, (label, side) in enumerate(zip(truth, sides, strict=True))]
    report = probe_knn(slides.archive, slides.csv("source,row,label,split", *lines), ks=(10,))
    oracle = KNeighborsClassifier(
        10, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine", algorithm="brute"
    ).fit(halves(given)[:40], truth[:40])
    answer = oracle.predict(halves(given)[40:])
    assert (report.train, report.test) == (40, 20)
    assert report.results[0].tiles.accuracy.value == pytest.approx(accuracy_score(truth[40:], answer))
    assert "1 group is in train and in test" in report.notes[0]


def test_duplicates_across_groups_leak_and_groups_by_patient_cure_it(slides):
    """Labels are noise: nothing can be known of them, except by finding a tile's double."""
    random = np.random.default_rng(6)
    truth = random.integers(0, 2, 80)
    given = random.standard_normal((80, 8))
    slides.add("first.svs", given[:40], patient="one")
    slides.add("double.svs", given[:40], patient="one")
    slides.add("other.svs", given[40:], patient="two")
    lines = [f"{name},{row},{truth[row]}" for name in ("first.svs", "double.svs") for row in range(40)]
    lines += [f"other.svs,{row},{truth[40 + row]}" for row in range(40)]
    by_patient = probe_knn(slides.archive, slides.csv("source,row,label", *lines), ks=(1,))
    assert by_patient.split == "leave one of 2 groups out"
    grouped = [f"{line},{line.split(',')[0]}" for line in lines]
    by_slide = probe_knn(slides.archive, slides.csv("source,row,label,group", *grouped), ks=(1,))
    leak = [sum(line[c] for c, line in enumerate(r.results[0].tiles.confusion)) / 120 for r in (by_slide, by_patient)]
    assert leak[0] > 0.75  # the 80 doubles are all right, whatever the encoder
    assert leak[1] < 0.65
    assert by_slide.notes[0].startswith("2 groups hold tiles of one and the same source or patient")
    assert by_patient.notes == ()


def test_one_group_says_that_neighbours_leak(slides):
    random = np.random.default_rng(8)
    truth = random.integers(0, 2, 30)
    slides.add("s.svs", clouds(random, truth))
    lines = [f"s.svs,{16 * row + 3},5,{label}" for row, label in enumerate(truth)]
    report = probe_knn(slides.archive, slides.csv("source,x,y,label", *lines), ks=(10, 29, 30))
    assert report.split == "leave one tile out"
    assert "neighbours on the same slide" in report.notes[0]
    assert report.notes[0] in report.text()
    assert report.results[1].tiles is not None
    last = report.results[2]
    assert (last.tiles, last.reason) == (None, "the smallest training set has 29 tiles")


def test_the_result_of_a_k_depends_on_no_other_k(slides):
    random = np.random.default_rng(9)
    truth = random.integers(0, 3, 90)
    slides.add("s.svs", clouds(random, truth))
    path = slides.csv("source,row,label", *(f"s.svs,{row},{label}" for row, label in enumerate(truth)))
    alone = probe_knn(slides.archive, path, ks=(5,)).results[0].tiles
    among = probe_knn(slides.archive, path, ks=(50, 5)).results[1].tiles
    assert among.confusion == alone.confusion
    assert among.auroc.value == pytest.approx(alone.auroc.value)


def test_what_is_left_out_is_told(slides):
    random = np.random.default_rng(10)
    valid = np.ones(20, np.uint8)
    valid[3:5] = 2
    slides.add("a.svs", clouds(random, [0, 1] * 10), valid=valid)
    slides.add("half.svs", clouds(random, [0, 1] * 10), complete=False)
    lines = [f"a.svs,{row},{row % 2}" for row in range(20)] + ["half.svs,0,1"]
    report = probe_knn(slides.archive, slides.csv("source,row,label", *lines), ks=(5,))
    assert report.tiles == 18
    assert any(note.startswith("1 labelled sources are not completely embedded") for note in report.notes)
    assert any(note.startswith("2 labelled tiles have no usable vector") for note in report.notes)


def test_training_sets_that_lack_a_class_are_told(slides):
    random = np.random.default_rng(12)
    slides.add("a.svs", clouds(random, [0] * 10))
    slides.add("b.svs", clouds(random, [1] * 10))
    report = probe_knn(slides.archive, slides.csv("source,label", "a.svs,no", "b.svs,yes"), ks=(5,))
    assert report.results[0].sources.accuracy.value == 0
    assert "2 of 2 training sets lack a class, which can then never be answered" in report.notes


def test_untrained_encoders_are_refused_unless_allowed(slides):
    slides.add("a.svs", clouds(np.random.default_rng(0), [0, 1] * 10), weights="untrained:0")
    path = slides.csv("source,row,label", *(f"a.svs,{row},{row % 2}" for row in range(20)))
    with pytest.raises(UsageError, match="random") as error:
        probe_knn(slides.archive, path)
    assert "--allow-untrained" in error.value.do
    report = probe_knn(slides.archive, path, allow_untrained=True, ks=(5,))
    assert report.untrained
    assert "untrained" in report.notes[0]


def test_the_report_is_json_and_text(slides):
    slides.add("a.svs", clouds(np.random.default_rng(0), [0, 1] * 20))
    path = slides.csv("source,row,label", *(f"a.svs,{row},{'no' if row % 2 else 'yes'}" for row in range(40)))
    report = probe_knn(slides.archive, path)
    record = json.loads(json.dumps(report.as_dict(), allow_nan=False))
    assert record["results"][0]["tiles"]["accuracy"]["baseline"] is not None
    assert record["results"][2] == {
        "k": 100,
        "tiles": None,
        "sources": None,
        "reason": "the smallest training set has 39 tiles",
    }
    assert record["counts"] == {"no": 20, "yes": 20}
    assert "k  100: none, the smallest training set has 39 tiles" in report.text()


@pytest.mark.parametrize(
    ("lines", "wrong"),
    [
        (["source,row", "a.svs,1"], "labels.csv: has no column 'label', but source, row"),
        (["name,label", "a.svs,1"], "labels.csv: has no column 'source'"),
        (["source,x,label", "a.svs,1,1"], "labels.csv: has only one of the columns x and y"),
        (["source,row,x,y,label", "a.svs,1,1,1,1"], "labels.csv: names tiles both by row and by x, y"),
        (["source,label"], "labels.csv: has no line below its first"),
        (["source,label", "a.svs"], "labels.csv line 2: has not as many values as columns"),
        (["source,label", "a.svs,1,2"], "labels.csv line 2: has not as many values as columns"),
        (["source,label", "a.svs,0", "z.svs,1"], "labels.csv line 3: z.svs: no source"),
        (["source,label", "a.svs, "], "labels.csv line 2: has no label"),
        (
            ["source,label", "a.svs,0", "/slides/a.svs,1"],
            "labels.csv line 3: this source is labelled in line 2 already",
        ),
        (
            ["source,row,label", "a.svs,0,0", "a.svs,0,1"],
            "labels.csv line 3: tile 0 of this source is labelled in line 2",
        ),
        (["source,row,label", "a.svs,20,1"], "labels.csv line 2: there is no row 20; the source has 20 rows"),
        (["source,row,label", "a.svs,-1,1"], "labels.csv line 2: there is no row -1"),
        (["source,row,label", "a.svs,1.5,1"], "labels.csv line 2: there is no row 1.5"),
        (["source,row,label", "a.svs,nan,1"], "labels.csv line 2: there is no row nan"),
        (["source,row,label", "a.svs,one,1"], "labels.csv line 2: row is 'one', no number"),
        (
            ["source,x,y,label", "a.svs,5,99,1"],
            "labels.csv line 2: x=5, y=99: no tile contains this place; the nearest",
        ),
        (["source,row,label,split", "a.svs,1,1,val"], "labels.csv line 2: split is 'val'; use train or test"),
        (["source,row,label,split", "a.svs,1,1,train"], "--labels: the split has no tile to test with"),
        (["source,row,label,group", "a.svs,1,1,"], "labels.csv line 2: has no group"),
        (["source,row,label", "a.svs,0,1", "a.svs,1,1"], "--labels: all training tiles are '1'; label a second class"),
        (
            ["source,row,label,split", "a.svs,0,1,train", "a.svs,1,0,test"],
            "--labels: all training tiles are '1'; label a second class",
        ),
    ],
)
def test_bad_labels_are_named(slides, lines, wrong):
    slides.add("a.svs", clouds(np.random.default_rng(0), [0, 1] * 10))
    with pytest.raises(UsageError) as error:
        probe_knn(slides.archive, slides.csv(*lines), ks=(1,))
    assert str(error.value).startswith(wrong)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00", b'source,label\n"a.svs,0\n'])
def test_a_file_that_is_no_csv_is_refused(slides, content):
    slides.add("a.svs", clouds(np.random.default_rng(0), [0, 1] * 10))
    path = slides.root / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"^labels\.csv: (cannot be read|is no CSV)"):
        probe_knn(slides.archive, path)


@pytest.mark.parametrize(
    "options", [{"ks": ()}, {"ks": (0,)}, {"ks": (5, 5)}, {"temperature": 0.0}, {"temperature": np.nan}]
)
def test_bad_numbers_are_refused(slides, options):
    slides.add("a.svs", clouds(np.random.default_rng(0), [0, 1] * 10))
    with pytest.raises(UsageError, match=r"^-k|^--temperature"):
        probe_knn(slides.archive, slides.csv("source,label", "a.svs,1"), **options)


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_whole_sources_are_judged_by_one_vector_each(slides, pool):
    random = np.random.default_rng(5)
    truth, lines, wholes = random.integers(0, 2, 24), ["source,label"], []
    for number, label in enumerate(truth):
        given = clouds(random, [label] * 7, spread=3.0)
        valid = np.array([1, 1, 2, 1, 1, 1, 1], np.uint8)
        slides.add(f"s{number}.svs", given, valid=valid)
        lines.append(f"s{number}.svs,class-{label}")
        good = halves(given)[valid == 1]
        wholes.append(good.mean(axis=0) if pool == "mean" else good.max(axis=0))
    report = probe_knn(slides.archive, slides.csv(*lines), ks=(5,), pool=pool)
    assert (report.tiles, report.sources, report.pool, report.labels_of) == (24, 24, pool, "sources")
    assert f"kNN probe of 24 sources, each the {pool} of its tiles, labelled by sources" in report.text()
    answer = np.empty(24, int)
    for out in range(24):
        others = np.arange(24) != out
        oracle = KNeighborsClassifier(
            5, weights=lambda distance: np.exp((1 - distance) / 0.07), metric="cosine", algorithm="brute"
        ).fit(np.array(wholes)[others], truth[others])
        answer[out] = oracle.predict([wholes[out]])[0]
    (result,) = report.results
    assert result.sources is None  # there is but one vector for each
    assert result.tiles.accuracy.value == pytest.approx(accuracy_score(truth, answer))


def test_labels_of_tiles_are_not_pooled(slides):
    slides.add("a.svs", np.eye(4))
    with pytest.raises(UsageError, match=r"--pool: the labels are of tiles; leave it out, or label whole sources"):
        probe_knn(slides.archive, slides.csv("source,row,label", "a.svs,0,x", "a.svs,1,y"), pool="mean")
