import itertools

import pytest

from znn.bench.protocol import Protocol


def test_orders_are_seeded_permutations_that_vary():
    take = lambda seed: list(itertools.islice(Protocol(seed=seed).orders(4), 20))  # noqa: E731
    assert take(1) == take(1) != take(2)
    assert all(sorted(order) == [0, 1, 2, 3] for order in take(1))
    assert len({tuple(order) for order in take(1)}) > 5


def test_stops_at_the_target_spread_but_not_before_the_fewest_rounds():
    protocol = Protocol(min_rounds=7, max_rounds=31, spread=0.05, max_s=100)
    assert not protocol.enough([[1.0] * 6])
    assert protocol.enough([[1.0] * 7])
    assert not protocol.enough([[1.0] * 7, [1.0, 2.0] * 4])


def test_hard_caps():
    noisy = [float(i % 5 + 1) for i in range(31)]
    assert Protocol(max_rounds=31, max_s=1e9).enough([noisy])
    assert not Protocol(max_rounds=32, max_s=1e9).enough([noisy])
    assert Protocol(min_rounds=7, max_s=3.0).enough([[4.0]])


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="rounds"):
        Protocol.from_dict({"rounds": 3})
    with pytest.raises(ValueError, match="min_rounds 9"):
        Protocol.from_dict({"min_rounds": 9, "max_rounds": 3})
    protocol = Protocol.from_dict({"interleave": ["threads"]})
    assert Protocol.from_dict(protocol.to_dict()) == protocol
