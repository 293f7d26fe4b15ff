import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from shrunk import chosen_of

from hf_prune.publish.plots import plot_layers, plot_schedule, plot_search, plot_units
from hf_prune.saved.removed import LayersLeft, Removed, UnitsLeft

# As a Trainer logs: training steps, evaluations, and a summary at the end.
HISTORY = [
    {"step": 1, "loss": 0.9, "learning_rate": 0.1, "sparsity": 0.0, "target_sparsity": 0.5},
    {"step": 2, "loss": 0.8, "learning_rate": 0.1, "sparsity": 0.3, "target_sparsity": 0.5},
    {"step": 2, "eval_loss": 0.7, "eval_accuracy": 0.5, "sparsity": 0.3, "target_sparsity": 0.5},
    {"step": 3, "loss": 0.6, "learning_rate": 0.0, "sparsity": 0.5, "target_sparsity": 0.5},
    {"step": 3, "train_runtime": 1.0, "train_loss": 0.7, "sparsity": 0.5, "target_sparsity": 0.5},
]


def opened(path):
    """The pixels of a PNG that opens."""
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


def close_to(pixels, color):
    """How many pixels have about this colour."""
    return int((np.abs(pixels.astype(int) - np.array(color)).max(axis=2) < 12).sum())


RED, BLUE = (0xB5, 0x43, 0x2B), (0x2B, 0x6C, 0xB5)


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved, in the end of the list."""
    figures = []
    save = FigureCanvasAgg.print_png

    def keep(canvas, *args, **kwargs):
        figures.append(canvas.figure)
        return save(canvas, *args, **kwargs)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", keep)
    return figures


def test_a_schedule_is_a_picture_of_a_sane_size_with_both_colours(tmp_path):
    plot_schedule(HISTORY, tmp_path / "schedule.png", "Title")
    pixels = opened(tmp_path / "schedule.png")
    assert pixels.shape == (480, 960, 3)
    assert close_to(pixels, RED) > 500
    assert close_to(pixels, BLUE) > 500


def test_a_schedule_shows_what_was_logged(tmp_path, drawn):
    plot_schedule(HISTORY, tmp_path / "schedule.png", "Title")
    left, right = drawn[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for axis in (left, right) for line in axis.get_lines()}
    sparsities = [[1, 0], [2, 0.3], [2, 0.3], [3, 0.5], [3, 0.5]]
    assert lines == {
        "sparsity": sparsities,
        "target sparsity": [[step, 0.5] for step, _ in sparsities],
        "training loss": [[1, 0.9], [2, 0.8], [3, 0.6]],
        "validation loss": [[2, 0.7]],
    }
    assert [line.get_label() for line in left.get_lines()] == ["sparsity", "target sparsity"]
    assert left.get_ylim() == (0, 1)
    assert right.get_ylim()[0] == 0
    assert left.get_title() == "Title"
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == list(lines)


def test_what_a_teacher_and_penalties_add_are_lines_of_their_own(tmp_path, drawn):
    """The loss beside that of the validation is the task's."""
    terms = {"task_loss": 0.4, "distillation_loss": 0.3, "hidden_loss": 0.2, "group_lasso_penalty": 0.1}
    history = [entry | terms if "loss" in entry else entry for entry in HISTORY]
    plot_schedule(history, tmp_path / "schedule.png", "m")
    values = {line.get_label(): list(line.get_ydata()) for axis in drawn[-1].axes for line in axis.lines}
    assert values["training loss of the task"] == [0.4] * 3
    assert values["distillation loss"] == [0.3] * 3
    assert values["hidden-state loss"] == [0.2] * 3
    assert values["penalty (group_lasso)"] == [0.1] * 3


@pytest.mark.parametrize(
    "history",
    [
        [],
        [{"step": 1}],
        [{"step": 1, "sparsity": 0.1}],
        [{"step": 1, "loss": 0.5}],
        [{"step": 1, "loss": math.nan, "sparsity": 0.1}],
        [{"step": 0, "eval_loss": math.inf, "sparsity": 0.0}],
    ],
    ids=["empty", "nothing known", "sparsity alone", "loss alone", "nan", "infinite"],
)
def test_a_schedule_of_little_is_a_picture_all_the_same(tmp_path, history):
    plot_schedule(history, tmp_path / "schedule.png", "Title")
    assert opened(tmp_path / "schedule.png").shape == (480, 960, 3)


def test_a_metric_has_a_panel_of_its_own_below_the_losses(tmp_path, drawn):
    plot_schedule(HISTORY, tmp_path / "schedule.png", "Title", "accuracy")
    assert opened(tmp_path / "schedule.png").shape == (720, 960, 3)
    above, below, losses = drawn[0].axes
    assert [line.get_label() for line in above.get_lines()] == ["sparsity", "target sparsity"]
    assert [line.get_label() for line in losses.get_lines()] == ["training loss", "validation loss"]
    (line,) = below.get_lines()
    assert (line.get_label(), line.get_xydata().tolist()) == ("validation: accuracy", [[2, 0.5]])
    assert (losses.get_ylabel(), below.get_ylabel()) == ("loss", "accuracy")
    assert (above.get_title(), below.get_xlabel(), above.get_xlabel()) == ("Title", "optimizer step", "")
    assert above.get_position().height > below.get_position().height
    assert above.get_xlim() == below.get_xlim()
    shown = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert shown == ["sparsity", "target sparsity", "training loss", "validation loss", "validation: accuracy"]


@pytest.mark.parametrize(
    ("values", "is_share"),
    [
        ([0.71, 0.72], True),
        ([0, 1], True),
        ([0.5], True),
        ([-0.1, 0.5], False),
        ([0.5, 1.01], False),
        ([0.5, 83.0], False),
        ([0.5, math.inf], False),
    ],
)
def test_a_metric_that_is_a_share_is_drawn_from_zero_to_one(tmp_path, drawn, values, is_share):
    history = [{"step": step, "eval_f1": value} for step, value in enumerate(values)]
    plot_schedule(history, tmp_path / "schedule.png", "Title", "f1")
    low, high = drawn[0].axes[1].get_ylim()
    assert ((low, high) == (0, 1)) is is_share
    assert all(low <= value <= high for value in values if math.isfinite(value))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a" * 30, "a" * 30),
        ("a" * 31, "a" * 29 + "…"),
        ("precision_at_recall_of_ninety_percent_macro", "precision_at_recall_of_ninety…"),
        ("$" * 40, "\\$" * 29 + "…"),
    ],
)
def test_a_long_name_of_a_metric_is_shortened(tmp_path, drawn, name, shown):
    plot_schedule([{"step": 1, f"eval_{name}": 0.5}], tmp_path / "schedule.png", "Title", name)
    assert drawn[0].axes[1].get_ylabel() == shown
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [f"validation: {shown}"]


def test_a_metric_before_any_sparsity_is_named_in_the_legend(tmp_path, drawn):
    history = [{"step": 1, "loss": 0.5}, {"step": 1, "eval_f1": 0.5}]
    plot_schedule(history, tmp_path / "schedule.png", "Title", "f1")
    shown = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert shown == ["training loss", "validation: f1"]


@pytest.mark.parametrize("metric", ["$a_b$", "a_b^c", "$", "$$", "\\frac{", "_f1", "a\\$b$c", "{}%"])
def test_a_metric_may_have_a_name_that_matplotlib_takes_for_a_formula(tmp_path, metric):
    history = [*HISTORY, {"step": 2, f"eval_{metric}": 0.5}]
    plot_schedule(history, tmp_path / "schedule.png", "Title", metric)
    assert opened(tmp_path / "schedule.png").shape == (720, 960, 3)


@pytest.mark.parametrize("metric", [None, "loss", "f1", "runtime"])
def test_a_metric_that_was_not_logged_has_no_panel(tmp_path, drawn, metric):
    plot_schedule(HISTORY, tmp_path / "schedule.png", "Title", metric)
    assert opened(tmp_path / "schedule.png").shape == (480, 960, 3)
    assert len(drawn[0].axes) == 2


@pytest.mark.parametrize("name", ["$\\frac$", "$a_b$", "a$b$c"])
def test_a_tensor_may_have_a_name_that_matplotlib_takes_for_a_formula(tmp_path, drawn, name):
    plot_layers({name: 0.5, "other": 0.25}, tmp_path / "layers.png", "Title")
    assert opened(tmp_path / "layers.png").size


def test_a_picture_is_the_same_to_the_byte_each_time(tmp_path):
    for name in ("a.png", "b.png"):
        plot_schedule(HISTORY, tmp_path / name, "Title", "accuracy")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_bars_are_as_long_as_tensors_are_sparse(tmp_path, drawn):
    shares = {"first": 0.25, "second": 1.0, "third": 0.0}
    plot_layers(shares, tmp_path / "layers.png", "Title")
    (axis,) = drawn[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == list(shares)
    assert [bar.get_width() for bar in axis.patches] == list(shares.values())
    assert axis.yaxis_inverted()
    assert axis.get_xlim() == (0, 1)
    assert axis.get_title() == "Title"
    rows = [(opened(tmp_path / "layers.png")[row : row + 1], row) for row in range(0, 240, 4)]
    lengths = [close_to(line, RED) for line, _ in rows]
    first, second = (length for length in dict.fromkeys(lengths) if length > 20)
    assert second == pytest.approx(4 * first, rel=0.05)


@pytest.mark.parametrize("count", [0, 1, 6, 60])
def test_the_picture_grows_with_the_number_of_tensors(tmp_path, count):
    plot_layers({f"layer.{index}.weight": 0.5 for index in range(count)}, tmp_path / "layers.png", "Title")
    height, width, _ = opened(tmp_path / "layers.png").shape
    assert width == 960
    assert height == pytest.approx(max(240, 120 * (0.8 + 0.17 * count)), abs=1)


def test_long_names_leave_room_for_the_bars(tmp_path):
    name = "base_model.model.model.layers.{}.block_sparse_moe.experts.gate_up_proj.base_layer.weight"
    plot_layers({name.format(index): 1.0 for index in range(12)}, tmp_path / "layers.png", "Title")
    pixels = opened(tmp_path / "layers.png")
    assert close_to(pixels, RED) > 0.1 * pixels.shape[0] * pixels.shape[1]


def test_a_picture_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "layers.png"
    path.write_bytes(b"no picture")
    plot_layers({"a": 0.5}, path, "Title")
    assert opened(path).size


def test_very_many_tensors_make_an_outline_of_a_sane_size(tmp_path, drawn):
    shares = {f"layer.{index}.weight": index / 4000 for index in range(4000)}
    plot_layers(shares, tmp_path / "layers.png", "Title")
    assert opened(tmp_path / "layers.png").shape == (480, 960, 3)
    (axis,) = drawn[0].axes
    (outline,) = axis.patches
    assert outline.get_data().values.tolist() == list(shares.values())
    assert (axis.get_xlim(), axis.get_ylim()) == ((0, 4000), (0, 1))
    assert axis.get_title() == "Title"


@pytest.mark.parametrize(("losses", "bottom_is_zero"), [((0.5, 0.25), True), ((0.5, -0.25), False)])
def test_losses_below_zero_are_in_the_picture(tmp_path, drawn, losses, bottom_is_zero):
    history = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    plot_schedule(history, tmp_path / "schedule.png", "Title")
    bottom = drawn[0].axes[1].get_ylim()[0]
    assert (bottom == 0) == bottom_is_zero
    assert bottom <= min(losses)


# ---- Units ----


def removed_of(units=(), layers=()):
    left = tuple(UnitsLeft(*one) for one in units)
    return Removed((100, 50), (80, 30), left, tuple(LayersLeft(*one) for one in layers))


def bars_of(axis):
    """Name -> the share that is left, and what is written beside its bar."""
    names = [label.get_text() for label in axis.get_yticklabels()]
    shares = [bar.get_width() for bar in axis.patches[len(names) :]]
    return dict(zip(names, zip(shares, (text.get_text() for text in axis.texts), strict=True), strict=True))


def test_units_that_are_left_are_bars_and_removed_layers_are_marked(tmp_path, drawn):
    units = [("neurons", "a.0", 8, 2), ("neurons", "a.10", 8, 4), ("heads", "a.0.self", 4, 3)]
    plot_units(removed_of(units, [("a", 11, (0, *range(2, 11)))]), tmp_path / "units.png")
    neurons, heads = drawn[0].axes
    assert bars_of(neurons) == {"a.0": (0.25, "2 of 8"), "a.1": (0.0, "layer removed"), "a.10": (0.5, "4 of 8")}
    assert bars_of(heads) == {"a.0.self": (0.75, "3 of 4"), "a.1": (0.0, "layer removed")}
    assert [axis.get_title() for axis in (neurons, heads)] == ["Neurons that are left", "Heads that are left"]
    assert close_to(opened(tmp_path / "units.png"), BLUE) > 500


def test_structures_of_a_search_are_a_line_and_the_chosen_one_is_marked(tmp_path, drawn):
    plot_search(chosen_of(), tmp_path / "search.png")
    [axis] = drawn[0].axes
    frontier, chosen, trained = axis.lines
    assert list(zip(frontier.get_xdata(), frontier.get_ydata(), strict=True)) == [
        (1.0, 0.0),
        (pytest.approx(10 / 7), 0.1),
        (2.5, 0.25),
    ]
    assert (list(chosen.get_xdata()), list(chosen.get_ydata())) == ([2.5], [0.25])
    assert chosen.get_label() == "chosen: 6 of 24 neurons and 2 of 4 layers"
    assert trained.get_label() == "trained: 2.40"
    assert close_to(opened(tmp_path / "search.png"), BLUE) > 100
    plot_search(chosen_of(reached=None), tmp_path / "search.png")
    assert len(drawn[-1].axes[0].lines) == 2


def test_what_was_chosen_is_in_the_picture_however_long_its_name(tmp_path, drawn):
    units = {"neurons": 9216, "heads": 72, "layers": 12}
    plot_search(replace(chosen_of(), units=units), tmp_path / "search.png")
    [figure] = drawn
    box = figure.legends[0].get_window_extent(figure.canvas.get_renderer())
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width


def test_hidden_dimensions_are_called_so(tmp_path, drawn):
    plot_units(removed_of([("hidden", "a", 8, 6)]), tmp_path / "units.png")
    assert drawn[0].axes[0].get_title() == "Hidden dimensions that are left"


def test_layers_alone_have_bars_of_their_own(tmp_path, drawn):
    plot_units(removed_of([], [("a", 3, (0, 2)), ("b", 1, (0,))]), tmp_path / "units.png")
    [axis] = drawn[0].axes
    assert bars_of(axis) == {"a.0": (1.0, ""), "a.1": (0.0, "removed"), "a.2": (1.0, ""), "b.0": (1.0, "")}


def test_very_many_units_are_a_picture_of_a_sane_size_without_names(tmp_path, drawn):
    plot_units(removed_of([("neurons", f"a.{index}", 8, 2) for index in range(2000)]), tmp_path / "units.png")
    [axis] = drawn[0].axes
    assert axis.get_yticks().tolist() == []
    height, width, _ = opened(tmp_path / "units.png").shape
    assert width == 960
    assert height < 7000


def test_a_name_of_units_is_no_formula(tmp_path):
    plot_units(removed_of([("neurons", r"$\frac{$", 8, 2)]), tmp_path / "units.png")
    opened(tmp_path / "units.png")
