from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from llmctl.quantize.knapsack import Option, choose

OPTIONS = st.builds(Option, st.integers(0, 12).map(lambda cost: 7 * cost), st.integers(0, 50).map(float))
GROUPS = st.lists(st.lists(OPTIONS, min_size=1, max_size=3), min_size=1, max_size=5)


def total(groups: list[list[Option]], chosen: tuple[int, ...] | list[int]) -> tuple[int, float]:
    taken = [group[i] for group, i in zip(groups, chosen, strict=True)]
    return sum(option.cost for option in taken), sum(option.loss for option in taken)


def bounds(groups: list[list[Option]]) -> tuple[int, int]:
    costs = [[option.cost for option in group] for group in groups]
    return sum(map(min, costs)), sum(map(max, costs))


CASES = GROUPS.flatmap(lambda groups: st.tuples(st.just(groups), st.integers(*bounds(groups))))


def least_loss(groups: list[list[Option]], budget: int) -> float | None:
    """By enumeration."""
    found = [total(groups, indices) for indices in product(*(range(len(group)) for group in groups))]
    return min((loss for cost, loss in found if cost <= budget), default=None)


@given(GROUPS, st.integers(0, 500))
def test_no_affordable_choice_loses_less(groups: list[list[Option]], budget: int) -> None:
    chosen, wanted = choose(groups, budget), least_loss(groups, budget)
    if chosen is None:
        assert wanted is None
        return
    cost, loss = total(groups, chosen)
    assert cost <= budget
    assert loss == wanted


@given(GROUPS, st.integers(0, 500), st.integers(0, 40), st.integers(1, 9))
def test_a_larger_budget_never_loses_more_whatever_the_unit(
    groups: list[list[Option]], budget: int, more: int, most_units: int
) -> None:
    small, large = choose(groups, budget, most_units), choose(groups, budget + more, most_units)
    if small is not None:
        assert large is not None
        assert total(groups, large)[1] <= total(groups, small)[1]
        assert total(groups, large)[0] <= budget + more


@given(CASES, st.integers(1, 9))
def test_coarse_units_cost_at_most_one_a_group(case: tuple[list[list[Option]], int], most_units: int) -> None:
    groups, budget = case
    span = sum(max(o.cost for o in group) - min(o.cost for o in group) for group in groups)
    unit = max(7, -(-span // most_units))
    chosen, wanted = choose(groups, budget, most_units), least_loss(groups, budget - unit * len(groups))
    assert chosen is not None
    assert total(groups, chosen)[0] <= budget
    if wanted is not None:
        assert total(groups, chosen)[1] <= wanted


def test_many_groups_are_no_work() -> None:
    groups = [[Option(1000 * bits + 13 * i, 4.0 ** (i % 7 - bits)) for bits in (3, 4, 8)] for i in range(500)]
    budget = sum(group[1].cost for group in groups)
    chosen = choose(groups, budget)
    assert chosen is not None
    cost, loss = total(groups, chosen)
    assert 0.99 * budget < cost <= budget
    assert loss < sum(group[1].loss for group in groups)


def test_of_equal_losses_the_cheaper_is_taken() -> None:
    assert choose([[Option(8, 1.0), Option(3, 1.0), Option(4, 1.0)]], 100) == [1]
