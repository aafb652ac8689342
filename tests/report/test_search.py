from lewis_hub.report.plots import PlottedTrial, SearchPlot, draw_search, places

TRIALS = (
    PlottedTrial(0, {"guide.gamma": 0.3, "normalize": True, "merge_method": "ties"}, 0.4),
    PlottedTrial(1, {"guide.gamma": 0.5, "normalize": False, "merge_method": "dare_ties"}, 0.2),
    PlottedTrial(2, {"guide.gamma": 0.4, "merge_method": "linear"}, None),
)


def test_numbers_lie_between_the_lowest_and_the_highest_and_choices_in_order():
    assert places(TRIALS, "guide.gamma") == {0: 0.0, 1: 1.0, 2: 0.5000000000000001}
    assert places(TRIALS, "normalize") == {0: 1.0, 1: 0.0}
    assert places(TRIALS, "merge_method") == {0: 1.0, 1: 0.0, 2: 0.5}
    assert places(TRIALS[:1], "guide.gamma") == {0: 0.5}


def test_a_search_is_drawn_light_and_dark_and_the_same_each_time(tmp_path):
    picture = SearchPlot("3 trials $", "answer loss", TRIALS, best=1, lower_is_better=True)

    names = draw_search(picture, tmp_path / "one")
    draw_search(picture, tmp_path / "two")

    assert names == ("search-light.png", "search-dark.png")
    light, dark = ((tmp_path / "one" / name).read_bytes() for name in names)
    assert light != dark
    assert light == (tmp_path / "two" / names[0]).read_bytes()


def test_nothing_is_drawn_where_no_trial_is_complete(tmp_path):
    picture = SearchPlot("none", "answer loss", TRIALS[2:], best=2, lower_is_better=True)

    assert draw_search(picture, tmp_path) == ()
