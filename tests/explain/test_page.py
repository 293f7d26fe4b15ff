import re

import numpy as np
import pytest
from explained import EXPLANATIONS, HOSTILE, alone, classifier, compared, empty, hostile, huge, language_model, smaller
from markdown_it import MarkdownIt
from PIL import Image

from hf_prune.explain.page import make_markdown, make_page, write_page
from hf_prune.explain.page_colors import STEPS, contrast, palette, step_of
from hf_prune.explain.page_heat import heads_by_layer, ranks_by_layer, shapes_by_layer, zeros_by_layer
from hf_prune.explain.page_pictures import drift_bars, lowest_confidence, reliability
from hf_prune.explain.page_rows import metric_tables, neuron_rows, scale_of, slice_tables
from hf_prune.publish.explanation import Matrix, UnitGroup, load_explanation, save_explanation


@pytest.fixture(scope="module", params=EXPLANATIONS)
def written(request, tmp_path_factory):
    """(explanation, folder, paths) of each explanation."""
    explanation = EXPLANATIONS[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    return explanation, folder, write_page(folder, explanation)


def test_what_is_returned_was_written_and_nothing_else(written):
    _, folder, paths = written
    assert {path for path in folder.rglob("*") if path.is_file()} == set(paths)
    assert {path.relative_to(folder).as_posix() for path in paths} >= {"explain/index.html", "explain/explanation.md"}


def test_pages_load_and_run_nothing(written):
    page = (written[1] / "explain" / "index.html").read_text(encoding="utf-8")
    for tag in ("script", "link", "img", "iframe", "object", "base", "form"):
        assert f"<{tag}" not in page.lower()
    assert re.findall(r"""(?:src|href|action|data)=["'](?!#)""", page) == []
    assert "url(" not in page
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_pictures_are_pictures(written):
    for path in written[2]:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.width <= 1000
                assert np.asarray(picture.convert("L")).std() > 5  # something is drawn
            assert path.stat().st_size < 400_000


def test_the_markdown_shows_the_pictures_that_there_are_and_renders_as_tables(written):
    _, folder, paths = written
    text = (folder / "explain" / "explanation.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"^!\[[^\]]*\]\((.*)\)$", text, re.MULTILINE))
    assert shown == {path.name for path in paths if path.suffix == ".png"}
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    assert sum(token.type == "table_open" for token in tokens) == len(re.findall(r"^\|[-:|]+\|$", text, re.MULTILINE))
    for block in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_no_text_becomes_html_in_markdown():
    text = make_markdown(hostile(), []).decode()
    allowed = {"<code>", "</code>"}
    found = MarkdownIt("commonmark").enable("table").parse(text)
    inner = [child for token in found if token.type == "inline" for child in token.children]
    assert {child.content for child in inner if child.type == "html_inline"} <= allowed
    assert not any(token.type == "html_block" for token in found)
    links = {child.attrs["href"] for child in inner if child.type == "link_open"}
    assert links == {"index.html", "explanation.json"}


def test_the_page_says_first_what_changed():
    page = make_page(classifier()).decode()
    assert (
        '<p class="lead">Of 1,500 answers 3.1% (2.2 to 4.0) changed: 1.9% from right to wrong, 1.2% from wrong to '
        "right. The pruned model is significantly worse than the dense one on 2 of 8 slices of the data. Worst "
        "accuracy: “with negations” 74.0% (dense 81.0%), “length: 23 to 52 tokens” 76.3% (dense 81.5%).</p>"
    ) in page


def test_the_page_says_what_answers_stay_and_on_which_inputs_times_were_taken():
    page = make_page(classifier()).decode()
    assert "90.2% (88.2 to 92.2) of the pruned model&#39;s answers stay as they are on unchanged texts" in page
    assert "The inputs are the first sample and the first 32 samples of the data of this page." in page
    assert '<td class="n">215</td><td class="n">212</td>' in re.sub(r">\s+<", "><", page)


def test_texts_are_shown_only_where_they_are_allowed():
    whole = classifier()
    hidden = [one.model_copy(update={"text": None}) for one in whole.answers.flipped]
    page = make_page(classifier(answers=whole.answers.model_copy(update={"flipped": tuple(hidden)}))).decode()
    assert "Their texts are not shown" in page
    assert '<th scope="col">text</th>' not in page


def test_pictures_of_an_earlier_explanation_are_deleted(tmp_path):
    write_page(tmp_path, classifier())
    paths = write_page(tmp_path, empty())
    assert {path.name for path in paths} == {"index.html", "explanation.md"}
    assert {path.name for path in (tmp_path / "explain").iterdir()} == {"index.html", "explanation.md"}


def test_an_explanation_that_was_saved_makes_the_same_files(tmp_path):
    save_explanation(tmp_path / "first", alone())
    written = write_page(tmp_path / "first", alone())
    again = write_page(tmp_path / "second", load_explanation(tmp_path / "first"))
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in again]


def test_half_a_pair_of_surrogates_is_saved_as_a_space(tmp_path):
    save_explanation(tmp_path, hostile())
    assert load_explanation(tmp_path).answers.flipped[4].text == "a\u2028b\x00 c"


# ---- Heat maps ----


def test_zeros_are_added_up_by_kind_and_layer_in_a_map_for_each_stack():
    maps = zeros_by_layer(huge().matrices)
    assert [(heat.of, len(heat.columns), len(heat.rows)) for heat in maps] == [
        ("encoder.layer", 48, 6),
        ("decoder.layer", 19, 6),
    ]
    one = next(matrix for matrix in huge().matrices if matrix.name == "decoder.layer.3.output.dense.weight")
    cell = maps[1].rows[5][1][3]
    assert cell.value == one.zeros / one.weights
    assert cell.told.startswith(f"{one.zeros:,} of {one.weights:,}")


def matrix(kind, layer, zeros, shape=(2, 500), **values):
    weights = shape[0] * shape[1]
    name = f"m.{layer}.{kind}.weight"
    values = {"zero_rows": 0, "zero_columns": 0} | values
    return Matrix(name=name, kind=kind, layer=layer, shape=list(shape), weights=weights, zeros=zeros, **values)


@pytest.mark.parametrize(("zeros", "text"), [(0, "0"), (1, "<1"), (500, "50"), (999, ">99"), (1000, "100")])
def test_nearly_nothing_is_not_nothing(zeros, text):
    (heat,) = zeros_by_layer([matrix("a", 0, zeros)])
    assert heat.rows[0][1][0].text == text


def test_layers_may_differ_in_what_they_have():
    (heat,) = zeros_by_layer([matrix("a", 0, 100), matrix("a", 2, 300), matrix("b", 2, 500)])
    assert heat.columns == ["0", "2"]
    assert [[cell and cell.text for cell in cells] for _, cells in heat.rows] == [["10", "30"], [None, "50"]]


def test_many_kinds_that_differ_in_numbers_share_a_row():
    (heat,) = zeros_by_layer([matrix(f"experts.{place}.up", 0, 100 * (place % 2)) for place in range(64)])
    assert [(name, cells[0].text) for name, cells in heat.rows] == [("experts.*.up", "5")]


def test_only_matrices_whose_sizes_differ_have_a_map_of_sizes():
    assert shapes_by_layer(smaller().matrices) == []
    (heat,) = shapes_by_layer(smaller(per_layer=True).matrices)
    assert [name for name, _ in heat.rows] == ["intermediate.dense", "output.dense"]
    assert [cell.text for cell in heat.rows[0][1]][:2] == ["1536×384", "1408×384"]
    assert heat.rows[0][1][5].value == pytest.approx(896 / 1536)


def test_ranks_are_shares_of_the_dense_models_or_of_the_shorter_side():
    one = matrix("a", 0, 0, (40, 80), effective_rank=10.0, dense_effective_rank=20.0)
    assert ranks_by_layer([one])[0].rows[0][1][0].text == "50"
    assert ranks_by_layer([one.model_copy(update={"dense_effective_rank": None})])[0].rows[0][1][0].text == "25"
    assert ranks_by_layer([matrix("a", 0, 0)]) == []
    assert [name for name, _ in ranks_by_layer([one, matrix("a.bias", 0, 0)])[0].rows] == ["a"]


def test_layers_that_are_left_have_the_numbers_of_the_dense_model():
    (heat,) = ranks_by_layer(smaller().matrices)
    assert heat.columns == ["0", "1", "3", "5"]
    told = (
        "Layers are numbered from 0, as in the dense model. Of the 6 layers in encoder.layer, 0, 1, 3 and 5 are left."
    )
    for text in (make_page(smaller()).decode(), make_markdown(smaller(), []).decode()):
        assert told in text
    page = make_page(smaller()).decode()
    assert '<th scope="row">encoder.<wbr>layer.<wbr>3.<wbr>output.<wbr>dense.<wbr>weight</th>' in page
    assert "where the layers that are left are numbered anew" in page
    assert "numbered" not in make_page(classifier()).decode()


def test_dead_heads_are_marked():
    (heat,) = heads_by_layer(classifier().units)
    marked = [(row, place) for row, cells in heat.rows for place, cell in enumerate(cells) if cell.is_marked]
    assert marked == [("4", 3)]


def test_the_spread_of_neurons_has_quartiles():
    zeros = [place / 100 for place in range(101)]
    group = UnitGroup(structure="neurons", path="m.0", layer=0, units=101, dead=1, zeros=zeros)
    (row,) = neuron_rows([group])
    assert row.places == [0, 25, 50, 75, 100]
    assert (row.layer, row.units, row.dead, row.median) == ("0", 101, 1, "50.0%")


# ---- Colours and scales ----


@pytest.mark.parametrize("is_dark", [False, True])
def test_text_on_every_colour_of_a_heat_map_can_be_read(is_dark):
    def channels(color):
        return tuple(int(color[place : place + 2], 16) for place in (1, 3, 5))

    colors = palette(is_dark)
    assert len(colors) == STEPS + 1
    assert min(contrast(channels(fill), channels(text)) for fill, text in colors) >= 4.5
    lights = [contrast(channels(fill), (0, 0, 0)) for fill, _ in colors]
    assert lights == sorted(lights, reverse=not is_dark)  # one after the other in lightness, for any eye


def test_contrast_is_that_of_wcag():
    assert contrast((255, 255, 255), (0, 0, 0)) == pytest.approx(21)
    assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)


def test_the_ends_of_the_palette_are_for_nothing_and_everything():
    assert [step_of(value) for value in (0, 1e-6, 0.5, 1 - 1e-6, 1)] == [0, 1, STEPS // 2, STEPS - 1, STEPS]


@pytest.mark.parametrize(
    "values", [[0.695, 0.88], [0.5], [0.0], [1.0], [0.0, 1.0], [3.1, 7.4], [-0.2, 0.3], [1e-5, 2e-5]]
)
def test_every_value_is_on_the_scale(values):
    scale = scale_of(values, as_percent=max(values) <= 1)
    assert scale.low <= min(values) <= max(values) <= scale.high
    places = [at for at, _ in scale.ticks]
    assert len(places) >= 2
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)
    assert len({text for _, text in scale.ticks}) == len(places)


def test_metrics_that_are_no_shares_have_scales_of_their_own():
    tables = metric_tables(classifier().metrics)
    assert [[row.name for row in table.rows] for table in tables] == [["accuracy", "f1"], ["loss"]]


def test_slices_are_in_the_order_of_what_was_lost_and_those_of_language_in_their_own():
    (table,) = slice_tables(classifier(slices=classifier().slices[::-1]))
    assert [row.name for row in table.rows][:3] == [
        "with negations",
        "length: 23 to 52 tokens",
        "rarity: rarest quarter",
    ]
    language = language_model()
    by = slice_tables(language.model_copy(update={"slices": language.slices[::-1]}))[::-1]
    assert [row.name for row in by[2].rows] == [f"position: {64 * place} to {64 * place + 63}" for place in range(8)]
    assert [len(table.rows) for table in by] == [2, 2, 8]


def test_a_row_without_an_interval_is_a_point():
    bare = compared("accuracy", 0.8)
    bare = bare.model_copy(update={"pruned": bare.pruned.model_copy(update={"low": None, "high": None})})
    (table,) = metric_tables([bare])
    mark = table.rows[0].pruned_mark
    assert mark.low == mark.at == mark.high
    assert table.rows[0].pruned == "80.0%"


# ---- Pictures of the page ----


def test_bins_without_samples_are_left_out_of_the_reliability_picture():
    calibration = classifier().answers.calibration
    picture = reliability(calibration, lowest_confidence([calibration]), "pruned")
    assert len(picture.bars) == len(calibration.bins) - 1
    assert picture.across[0][1] == "50%"
    highest = max(picture.bars, key=lambda bar: bar.count_height)
    assert "1,920 samples" in highest.told
    for bar in picture.bars:
        assert picture.left <= bar.x <= bar.at <= picture.right
        assert picture.top <= bar.y <= picture.bottom


def test_a_calibration_without_samples_is_an_empty_picture():
    calibration = empty().answers.calibration
    assert reliability(calibration, lowest_confidence([calibration]), "pruned").bars == []


def test_layers_that_are_gone_have_no_bar():
    bars = drift_bars(smaller().drift)
    assert [(layer, text) for layer, text, width in bars.rows if width is None] == [
        ("2", "layer removed"),
        ("4", "layer removed"),
    ]
    assert "1 − linear CKA" in bars.words
    assert drift_bars(alone().drift) is None


def test_hostile_texts_are_there_as_texts():
    page = make_page(hostile()).decode()
    assert HOSTILE not in page
    assert "&lt;script&gt;document.title = &#39;taken over&#39;&lt;/script&gt;" in page
    assert "\x00" not in page
