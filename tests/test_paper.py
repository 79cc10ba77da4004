"The paper's tables as data, the audit of its claims, and the notebooks that read them."
import csv, json, os, re
from pathlib import Path

import numpy as np
import pytest

REPO = Path(__file__).resolve().parents[1]
PAPER = REPO / "results" / "paper"
METRICS = ("rank-1", "rank-10", "rank-20", "mAP")
CELLS = [f"{block} {metric}" for block in ("single", "multi", "regdb") for metric in METRICS]


def rows(number):
    "A table of the paper as the repository holds it: one dict a row."
    lines = (PAPER / f"table{number}.csv").read_text(encoding="utf-8").splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


@pytest.fixture(scope="module")
def paper():
    "The paper's text: `DI2L_PAPER`, or `shared/paper/di2l.md` beside the checkout."
    path = Path(os.environ.get("DI2L_PAPER", REPO.parent / "shared" / "paper" / "di2l.md"))
    if not path.exists(): pytest.skip("the paper's text (di2l.md) is not here; point DI2L_PAPER at it")
    return path.read_text(encoding="utf-8")


def printed_rows(paper, number):
    "Rows of a table in the paper's text: [method as printed, cell, …]."
    lines = "\n".join(paper[paper.index(f"**Table {number}.**"):].split("\n\n")[:3]).splitlines()
    cells = [line.split("\t") for line in lines]
    return [row for row in cells if len(row) > 8 and row[0] not in ("", "Method")]


def plain(text):
    "Text without the markup of the paper's file."
    text = re.sub(r"\s*<sup>2</sup>\s*", "²", text)
    for mark in ("<b>", "</b>", "**", "$"): text = text.replace(mark, "")
    for tex, sign in ((r"\gamma", "γ"), (r"\leq", "≤"), (r"\times", "×")): text = text.replace(tex, sign)
    return re.sub(r"\s+", " ", text).replace(" ,", ",").strip()


# ---- the tables --------------------------------------------------------------------------------------

def test_table1_cell_by_cell(paper):
    printed, own = printed_rows(paper, 1), rows(1)
    assert (len(printed), len(own)) == (14, 14)
    for cells, row in zip(printed, own):
        method, reference = re.fullmatch(r"(.*?)(?:\s*\[(\d+)\]|\(ours\))", plain(cells[0])).groups()
        assert (row["method"], row["reference"]) == (method, reference or "-")
        assert [row[c] for c in CELLS] == [plain(c) for c in cells[1:]], method


def test_years_are_those_of_the_references(paper):
    listed = dict(re.findall(r"^(\d+)\. .*\((\d{4})\)", paper, re.M))
    assert len(listed) == 25
    for row in rows(1): assert row["year"] == listed.get(row["reference"], "-")


def test_what_is_bold_in_the_paper_is_the_best_of_its_column(paper):
    bold = [cells for cells in printed_rows(paper, 1) if "<b>" in cells[1]]
    assert len(bold) == 1 and all(c.startswith("<b>") for c in bold[0])
    for k, column in enumerate(CELLS):
        numbers = [float(r[column]) for r in rows(1) if r[column] != "-"]
        assert float(plain(bold[0][1 + k])) == max(numbers) and numbers.count(max(numbers)) == 1


def test_table2_cell_by_cell(paper):
    printed, own = printed_rows(paper, 2), rows(2)
    assert (len(printed), len(own)) == (3, 3)
    for cells, row in zip(printed, own):
        assert [row["method"], *(row[c] for c in CELLS[:8])] == [plain(c) for c in cells]


def test_cells_printed_elsewhere_are_cells_and_others():
    "Every line names a row and a column of Table 1, a number that is not the paper's, and where it is from."
    own = {r["method"]: r for r in rows(1)}
    lines = (PAPER / "elsewhere.csv").read_text(encoding="utf-8").splitlines()
    for line in csv.DictReader(line for line in lines if not line.startswith("#")):
        assert abs(float(own[line["method"]][line["cell"]]) - float(line["elsewhere"])) > 0.1, line
        assert len(line["source"]) > 10


def test_the_files_say_whose_numbers_they_are():
    for n in (1, 2):
        assert "of the paper" in (PAPER / f"table{n}.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "Nothing here was measured" in (PAPER / "README.md").read_text(encoding="utf-8")


# ---- the notebooks, run on records whose outcome is known ---------------------------------------------

def fake_record(name, data_seed, seed):
    "A record that is easily predicted: focal loss gains 2 over CE, DPA 3 over the baseline, a seed 1."
    from di2l import experiments
    e, name = experiments.EXPERIMENTS[name], (full := name).removeprefix("table2-").removeprefix("row-")
    focal = name.endswith("focal")
    level = 60 + 5 * data_seed + seed + 3 * (name == "dpa") + 5 * (name == "di2l") - 4 * (name == "agw")
    if name.startswith(("correlation-", "sensor-")):
        level = 50 + 20 * float(name.split("-")[1]) + seed + 2 * focal + 0.1 * seed * focal
    above = dict(rank1=0, rank10=10, rank20=15, mAP=-5, mINP=-20)
    metrics = lambda x: {k: (x + d) / 100 for k, d in above.items()}
    if name.startswith("regdb"):
        protocols = {f"{d} all": metrics(level) for d in ("infrared→visible", "visible→infrared")}
    else:
        protocols = {f"infrared→visible {mode} {shots}-shot": metrics(level + 4 * (shots == "multi"))
                     for mode in ("all", "indoor") for shots in ("single", "multi")}
    infrared = 0.8 + 0.02 * (focal or name == "di2l") + 0.001 * seed
    sure = dict(visible=dict(confidence=0.9, accuracy=1.0), infrared=dict(confidence=infrared, accuracy=0.95))
    itself = dict(visible={"rank-1": level + 10}, infrared={"rank-1": level - 10 + seed})
    of, code = experiments._identity(e, data_seed, seed), experiments._code(e)
    return dict(name=full, data_seed=data_seed, seed=seed, identity=of, metrics=protocols, intra_modality=itself,
                confidence=sure, **(dict(code=code) if code else {}))


def write_fake_records(results):
    "A record for every run that is planned."
    from di2l import experiments
    from di2l.methods import measured                                  # which plans the rows of Table 1
    assert set(measured.ROW_OF.values()) <= experiments.PLAN.keys()
    from di2l.results.record import record_path
    for planned in (experiments.PLAN, experiments.CONFIRM):
        for run in ((name, d, s) for name, pairs in planned.items() for d, s in pairs):
            record_path(*run, results).write_text(json.dumps(fake_record(*run)), encoding="utf-8")


@pytest.fixture(scope="module")
def run_notebook(tmp_path_factory):
    """A function that runs a notebook's cells in a copy of its folders and returns its variables.

    Cells that compute what is given are left out."""
    import matplotlib, nbformat, warnings
    matplotlib.use("Agg")
    from IPython.display import display
    from di2l import experiments

    monkey = pytest.MonkeyPatch()
    def run(name, records=True, **given):
        root, back = tmp_path_factory.mktemp(name), Path.cwd()
        for folder in ("nbs", "results/runs", "figures"): (root / folder).mkdir(parents=True)
        for given_there in ("paper", "benchmarks"): (root / "results" / given_there).symlink_to(REPO / "results" / given_there)
        if records: write_fake_records(root / "results")
        monkey.setattr(experiments, "complete", lambda *names, **_: None)   # or it makes what is missing
        notebook = nbformat.read(REPO / "nbs" / f"{name}.ipynb", 4)
        cells = [c.source for c in notebook.cells if c.cell_type == "code"]
        cells = [c for c in cells if not any(f"\n{g} = " in f"\n{c}" for g in given)]
        space, old = dict(display=display, __name__="__main__", **given), os.environ.pop("DI2L_DATA", None)
        os.chdir(root / "nbs")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*non-interactive.*")
                for cell in cells: exec(compile(cell, name, "exec"), space)
        finally:
            os.chdir(back)
            if old is not None: os.environ["DI2L_DATA"] = old
        return space, root
    yield run
    monkey.undo()


@pytest.fixture(scope="module")
def table1(run_notebook): return run_notebook("20_table1")


@pytest.fixture(scope="module")
def claims(run_notebook): return run_notebook("25_claims")


def test_table1_shows_means_and_intervals_of_the_records(table1):
    "A fake row is at 60, or 5 above that for DI2L, and 5 higher on each further data seed."
    from scipy.stats import t
    from di2l.experiments import PLAN
    space, root = table1
    cells = space["cells"].set_index(space["printed"].method)
    for row, base in (("DI2L", 65), ("DDAG", 60)):                 # on the data that all rows have
        levels = [base + 5 * d for d, _ in PLAN["row-ddag"]]
        half = t.ppf(0.975, len(levels) - 1) * np.std(levels, ddof=1) / len(levels) ** 0.5
        assert cells.loc[row, "single rank-1"] == f"{np.mean(levels):.1f} ± {half:.1f}"
    assert "±" in cells.loc["CAJ", "regdb mAP"] and cells.loc["AGW", "regdb mAP"] == "–"
    assert list(space["states"][[7, 13]]) == ["4 runs", "4 + 6 runs"]
    names = {"margins", "order", "pairs", "cost"}
    assert {f"table1_{n}.png" for n in names} <= {p.name for p in (root / "figures").iterdir()}


def test_table1_compares_rows_on_the_same_data(table1):
    "DI2L is 5 above all others on every data seed, AGW 4 below them, and nothing else differs."
    space, _ = table1
    assert space["against"].loc["DI2L", ["mean", "low", "high"]].tolist() == pytest.approx([5, 5, 5])
    assert space["against"].loc["DDAG", "mean"] == pytest.approx(0)
    seen = space["pairs"][space["pairs"].seen]
    assert len(space["pairs"]) == 91 and len(seen) == 25                  # 13 of DI2L, 12 more of AGW
    assert set(seen.row) | set(seen.other) >= {"DI2L", "AGW"} and (seen.mAP > 3).all()
    assert space["short"]("MACE") == "MACE †" and space["short"]("DDAG") == "DDAG"


def test_protocols_of_table1_are_those_of_the_datasets(table1):
    import pandas as pd
    from di2l.eval import regdb_protocol, sysu_protocol
    from di2l.results.record import label
    pair = dict(pid=[1, 1], modality=["visible", "infrared"], frame=1, split="test")
    regdb, sysu = pd.DataFrame(dict(pair, cam=[1, 2])), pd.DataFrame(dict(pair, cam=[1, 3]))
    made = dict(single=sysu_protocol(sysu, "all", 1), multi=sysu_protocol(sysu, "all", 10),
                regdb=regdb_protocol(regdb, "infrared→visible"))
    assert {k: label(p.about) for k, p in made.items()} == table1[0]["PROTOCOLS"]


def test_table1_says_that_no_dataset_was_found(table1):
    space, _ = table1
    assert space["found"] == {} and set(space["real"].iloc[-1]) == {"–"}
    assert space["missing"] == "no SYSU-MM01 found, no RegDB found"


def test_a_real_dataset_is_trained_evaluated_and_recorded_once(table1, tmp_path):
    "The embedded benchmark stands in for SYSU-MM01; the settings are the paper's but for size and length."
    from di2l.synthetic.benchmark import write_benchmark
    space, root = table1
    sysu = write_benchmark(tmp_path / "SYSU-MM01", "tiny", 0)
    os.environ["DI2L_DATA"] = str(tmp_path)
    try: found = space["real_datasets"]()
    finally: del os.environ["DI2L_DATA"]
    assert found == {"sysu": sysu}
    back = Path.cwd(); os.chdir(root / "nbs")
    try:
        small = dict(steps=2, size=(48, 24), ids=4, visible=2, infrared=2, backbone="resnet10", weights=None,
                     device="cpu", precision="fp32")
        row = space["real_row"]("DI2L", found, **small)
        made = sorted((root / "results" / "real").iterdir())
        assert [p.name for p in made] == ["sysu-di2l-t1.json"]
        assert str(tmp_path) not in made[0].read_text()
        record = json.loads(made[0].read_text())
        assert {"data", "device", "precision", "versions", "seconds", "metrics", "curve"} <= record.keys()
        assert record["galleries"] == "drawn by seed"
        stamp = made[0].stat().st_mtime_ns
        assert space["real_row"]("DI2L", found, **small) == row and made[0].stat().st_mtime_ns == stamp
        next((sysu / "cam1").rglob("*.jpg")).unlink()                          # other images: another number
        assert space["real_record"]("DI2L", "sysu", sysu, **small)["data"] != record["data"]
    finally: os.chdir(back)
    assert row["regdb mAP"] == "–"
    assert 0 <= float(row["single rank-1"]) <= 100 and 0 <= float(row["multi mAP"]) <= 100
    assert set(space["real_row"]("DDAG", {}).values()) == {"–"}
    settings = {m: space["config"](preset).method for m, preset in space["PRESETS"].items()}
    assert len(settings) == 14 and (settings["DDAG"], settings["Zero-padding"], settings["DI2L"]) == ("ddag", "zero-padding", "di2l")


FALSE = """
the proposed method achieves 70.42% Rank-1 and 59.52% mAP
we achieve 88.89% Rank-1 and 83.38% mAP
at least 4% improvement on mPA and Rank-1
bringing at least 9.56% and 4.63% mAP improvements on SYSU-MM01 and RegDB respectively
an absolute gain of at least 10% and 8% in terms of Rank-1 and mPA on the two datasets
It does not introduce additional learnable parameters nor extra computation cost in both the train and test phases
CAJ [17], NFS [22], and MAUM [9]
state-of-the-art methods in VI-ReID published in the last three years
the DPA module brings a 1.5% mAP improvement to the baseline in the single-shot domain
the whole model brings an additional 1.08% Rank-1 improvement on the baseline
with tunable focusing parameter γ ≤ 0
[the RegDB cells of the Zero-padding row]
When γ = 0, focal loss is equivalent to the CE loss
"""
TRUE = """
Our method also achieves the best performance in the multi-shot mode
Each person has 10 visible images taken by a visible camera and 10 infrared images captured by a far-infrared camera
we have 8 × 4 × 3 images for each mini-batch
"""
MUST_BE_THERE = {**dict.fromkeys(FALSE.strip().splitlines(), "does not hold"),
                 **dict.fromkeys(TRUE.strip().splitlines(), "holds"),
                 "when γ = 2, the model performs best": "cannot be told"}


def test_verdicts(claims):
    verdicts = {a["claim"]: a["verdict"] for a in claims[0]["AUDIT"]}
    assert len(verdicts) == len(claims[0]["AUDIT"])
    assert {k: verdicts[k] for k in MUST_BE_THERE} == MUST_BE_THERE
    points = claims[0]["points"]
    assert list(points.what[points.borne_out]) == ["single-shot Rank-1", "least mAP over GANs"]
    drawn = claims[1] / "figures"
    assert (drawn / "claims.csv").exists()
    assert (drawn / "claims_points.png").read_bytes() == (REPO / "figures" / "claims_points.png").read_bytes()


def test_every_quotation_is_in_the_paper(claims, paper):
    text = plain(paper)
    quotes = [a["claim"] for a in claims[0]["AUDIT"] if not a["claim"].startswith("[")]
    assert len(quotes) > 30
    for quote in quotes: assert quote in text, quote


def test_sysu_counts_are_those_of_the_official_file(claims, sysu_protocol_files):
    from scipy.io import loadmat
    cells = loadmat(sysu_protocol_files / "rand_perm_cam.mat")["rand_perm_cam"][:, 0]
    images = np.zeros((6, max(map(len, cells))), int)
    for cam, cell in enumerate(cells):
        images[cam, :len(cell)] = [m.shape[1] if m.size else 0 for m in cell[:, 0]]
    visible, infrared = images[[0, 1, 3, 4]], images[[2, 5]]
    both = (visible.sum(0) > 0) & (infrared.sum(0) > 0)
    test = loadmat(sysu_protocol_files / "test_id.mat")["id"].size
    assert claims[0]["SYSU"] == dict(visible=visible.sum(1).tolist(), infrared=infrared.sum(1).tolist(),
                                     identities=int((images.sum(0) > 0).sum()), in_both=int(both.sum()),
                                     visible_of_both=int(visible[:, both].sum()),
                                     infrared_of_both=int(infrared[:, both].sum()), test=test)


def test_flops_agree_with_a_count_by_hand(claims):
    "DPA at 2048 channels and 3 parts: u and v to 512, z to 2048, affinities, weighted sum; two a multiplication."
    per_image = 2 * 3 * (2 * 2048 * 512 + 2048 * 2048) + 2 * 3 * 3 * 512 + 2 * 3 * 3 * 2048
    costs = claims[0]["costs"]["test, one image (10⁹ FLOPs)"]
    assert costs.iloc[3] - costs.iloc[2] == pytest.approx(per_image / 1e9, rel=0.01)


def test_hypothesis_from_known_records(claims):
    space, root = claims
    tested = space["tested"].set_index(["statement", "dial", "level"])
    focal = tested.loc["focal loss raises infrared→visible"]
    by_level = {0.5: 2.1, 0.85: 2.0, 0.95: 2.1}                        # the default's level is told by dpa and di2l
    assert focal["mean"]["correlation"].to_dict() == pytest.approx(by_level)
    assert focal["mean"]["infrared resolution"].to_dict() == pytest.approx({0.25: 2.1, 0.5: 2.1, 1.0: 2.0})
    assert set(focal.answer) == {"yes"} and set(focal.pairs) == {6}
    gap = tested.loc["focal loss narrows that gap"]
    assert gap["mean"].to_numpy() == pytest.approx(2.0)
    odds = [np.log(p / (1 - p)) for p in (0.801, 0.821)]               # the middle one of three nearly equal seeds
    narrower = tested.loc["focal loss narrows it in log-odds"]["mean"].to_numpy()
    assert narrower == pytest.approx(odds[1] - odds[0], rel=1e-3)
    twins = space["answers"].set_index("statement")
    assert twins["pairs"].unique().tolist() == [22]
    assert twins["mean"]["focal narrows the gap in confidence"] == pytest.approx(2.0)
    assert twins["mean"]["focal − CE: confidence, visible"] == 0
    assert twins["mean"]["focal − CE: infrared→visible Rank-1"] == pytest.approx(2.0)
    assert {p.name for p in (root / "figures").iterdir()} >= {"hypothesis.png", "hypothesis.csv"}


def test_the_gap_between_modalities_is_shown_with_and_without_rca(claims):
    exposure = claims[0]["exposure"].set_index("method")
    assert exposure.runs.tolist() == [4, 4, 4, 4]
    first = exposure.loc[["CAJ, with RCA", "DI2L without RCA"], "confidence, visible − infrared"]
    assert list(first.str.split(" [", regex=False).str[0]) == ["+10.0", "+10.0"]


def test_measured_differences_are_paired(claims):
    here = {a["claim"]: a["measured_here"] for a in claims[0]["AUDIT"]}
    dpa = "the DPA module brings a 1.5% mAP improvement to the baseline in the single-shot domain"
    assert here[dpa].startswith("attention that lives +3.0 mAP")
    assert "rises in 8 of 8 runs" in here["[from single-shot to multi-shot]"]


def test_without_records_the_audit_runs_and_says_so(run_notebook, claims):
    counted = dict(costs=claims[0]["costs"])                           # counting FLOPs again would take seconds
    space, root = run_notebook("25_claims", records=False, **counted)
    here = {a["claim"]: a["measured_here"] for a in space["AUDIT"]}
    assert here["when γ = 2, the model performs best"] == "no record yet"
    verdicts = {a["claim"]: a["verdict"] for a in space["AUDIT"]}
    assert {k: verdicts[k] for k in MUST_BE_THERE} == MUST_BE_THERE
    assert not (root / "figures" / "hypothesis.png").exists()
