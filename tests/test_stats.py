"Statistics of few items and of clusters: tests against brute force, intervals against SciPy, false alarms and coverage by simulation."
import itertools
from functools import partial

import numpy as np, pytest
from hypothesis import given, settings, strategies as st
from scipy import stats as ss
from llava_reward_nb import stats
from llava_reward_nb.stats import accuracy, auroc, f1, interval, kendall_tau_b, mean, paired_p, pearson, precision, recall, spearman

NO_TIES = partial(accuracy, ties=False)
AVERAGE = lambda v, t, w: mean(v, w)


def standard(x): return (x-x.mean())/x.std()


# what each statistic is computed from, plainly, and the scale on which two rewards are exchanged
PLAIN = {
    'mean': (AVERAGE, lambda v, t: v.mean(), lambda x: x, 'scores'),
    'accuracy': (accuracy, lambda v, t: (v == t).mean(), lambda x: x, 'decisions'),
    'without ties': (NO_TIES, lambda v, t: (v == t)[v != .5].mean(), lambda x: x, 'ties'),
    'F1': (f1, lambda v, t: 2*((v == 1) & (t == 1)).sum()/((v == 1).sum()+(t == 1).sum()), lambda x: x, 'decisions'),
    'Pearson': (pearson, lambda v, t: ss.pearsonr(v, t)[0], standard, 'scores'),
    'Spearman': (spearman, lambda v, t: ss.spearmanr(v, t)[0], ss.rankdata, 'scores'),
    'Kendall': (kendall_tau_b, lambda v, t: ss.kendalltau(v, t)[0], ss.rankdata, 'scores'),
    'AUROC': (auroc, lambda v, t: (v[t == 1][:, None] > v[t == 0]).mean()+(v[t == 1][:, None] == v[t == 0]).mean()/2, ss.rankdata, 'scores'),
}


def data(kind, n, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, n))+rng.normal(size=n)
    if kind == 'decisions': a, b = (a > 0).astype(float), (b > .2).astype(float)
    if kind == 'ties': a, b = rng.choice([0., .5, 1.], (2, n), p=[.2, .2, .6])
    return a, 3*b+1 if kind == 'scores' else b


@pytest.mark.parametrize('name', PLAIN)
@pytest.mark.parametrize('groups', [None, [0, 0, 1, 2, 2, 2, 3, 4, 5]])
def test_p_is_the_share_of_all_exchanges(name, groups):
    "Every way to exchange the two rewards, written out, and the statistic computed by another library."
    stat, plain, scale, kind = PLAIN[name]
    for seed in range(1 if kind == 'scores' else 3):
        a, b = data(kind, 9, seed)
        t = np.array([1, 0, 1, 1, 0, 1, 0, 1, 0]) if name != 'mean' else None
        if name in ('Pearson', 'Spearman', 'Kendall'): t = np.random.default_rng(seed+50).normal(size=9)
        x, y, of = scale(a), scale(b), np.arange(9) if groups is None else np.array(groups)
        d = []
        for way in itertools.product([False, True], repeat=of.max()+1):
            swap = np.array(way)[of]
            d.append(abs(plain(np.where(swap, y, x), t)-plain(np.where(swap, x, y), t)))
        want = (np.array(d) >= d[0]-1e-9).mean()
        assert paired_p(stat, a, b, t, groups) == pytest.approx(want, abs=1e-9)
        assert paired_p(stat, b, a, t, groups) == pytest.approx(want, abs=1e-9)
        order = np.random.default_rng(seed).permutation(9)
        moved = [None if v is None else np.asarray(v)[order] for v in (a, b, t, groups)]
        assert paired_p(stat, *moved) == pytest.approx(want, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from([0., .5, 1.]), st.sampled_from([0., .5, 1.])), min_size=1, max_size=40))
def test_nothing_is_significant_with_fewer_than_six_clusters(rows):
    groups, a, b = map(list, zip(*rows))
    p = paired_p(accuracy, a, b, np.ones(len(a)), groups)
    g = len(set(groups))
    assert 2/2**g-1e-9 <= p <= 1 and (p > .05 or g >= 6)
    assert np.isnan(interval(accuracy, a, np.ones(len(a)), groups=groups)).all() == (g < stats.FEWEST)


def test_drawn_exchanges_agree_with_all_of_them():
    rng = np.random.default_rng(0)
    for n in (12, 14):
        a, b = rng.normal(.4, 1, n), rng.normal(size=n)
        assert paired_p(AVERAGE, a, b, m=1500) == pytest.approx(paired_p(AVERAGE, a, b, m=2**n), abs=.04)
    assert paired_p(AVERAGE, np.arange(300)+1., np.zeros(300), m=999) == 1/1000 # the least there is


@pytest.mark.parametrize('name', ['accuracy', 'without ties', 'mean', 'Pearson', 'Kendall', 'AUROC'])
@pytest.mark.parametrize('g, k', [(1, 1), (2, 1), (6, 1), (10, 1), (6, 5), (10, 5)])
def test_false_alarms(name, g, k):
    "Two rewards of one kind, on different scales where that must not matter; 300 data sets, so that .05 may look like .088."
    stat, _, _, kind = PLAIN[name]
    of, alarms = np.repeat(np.arange(g), k), 0
    for seed in range(300):
        rng = np.random.default_rng([seed, g, k])
        noise = lambda: rng.normal(size=g)[of]+rng.normal(size=g*k)
        truth = noise()
        a, b = truth+noise(), truth+noise()
        if name == 'AUROC': truth = (truth > 0).astype(float)
        if kind in ('decisions', 'ties'):
            a, b = (np.where(abs(v-truth) < .2, .5, v > truth-.5) if kind == 'ties' else (v > truth).astype(float) for v in (a, b))
            truth = np.ones(g*k)
        elif name != 'mean': b = 7*b-2
        alarms += paired_p(stat, a, b, truth, of, m=199) < .05
    assert alarms/300 <= .05+3*np.sqrt(.05*.95/300) and (alarms == 0 or g >= 6)


def test_the_best_of_many_equals_raises_no_alarm():
    "The best of six equal rewards against the second best, both picked after looking."
    alarms = 0
    for seed in range(200):
        right = np.random.default_rng(seed).random((6, 40)) < .7
        best = right[np.argsort(-right.mean(1), kind='stable')].astype(float)
        alarms += paired_p(accuracy, best[0], best[1], np.ones(40), m=199) < .05
    assert alarms/200 <= .05


# ---- intervals

def test_shares_have_the_exact_interval():
    for right in (0, 1, 4, 6, 7, 11, 12):
        ok = np.r_[np.ones(right), np.zeros(12-right)]
        want = tuple(ss.binomtest(right, 12).proportion_ci(method='exact'))
        for stat, *args in ((accuracy, ok, np.ones(12)), (mean, ok), (recall, np.r_[ok, 1, 0], np.r_[np.ones(12), 0, 0]), (NO_TIES, np.r_[ok, .5, .5], np.ones(14)),
                            (partial(recall, positive=0), 1-ok, np.zeros(12))):
            assert interval(stat, *args) == pytest.approx(want, abs=1e-9), stat
    said = np.r_[np.ones(12), np.zeros(9)]
    assert interval(precision, said, np.r_[np.ones(8), np.zeros(4), np.ones(9)]) == pytest.approx(tuple(ss.binomtest(8, 12).proportion_ci(method='exact')), abs=1e-9)


@pytest.mark.parametrize('stat, keyword', [(accuracy, dict(ties=False)), (precision, dict(positive=0)), (recall, dict(positive=0)), (f1, dict(positive=0))])
def test_an_option_counts_by_name_and_by_place(stat, keyword):
    "Its interval is of the same items, however the option was given."
    rng = np.random.default_rng(3)
    label = rng.integers(0, 2, 40).astype(float)
    pred = np.where(rng.random(40) < .8, label, 1-label)
    if stat is accuracy: pred[:5] = .5
    by_name, by_place = interval(partial(stat, **keyword), pred, label), interval(stat, pred, label, *keyword.values())
    assert by_place == pytest.approx(by_name, abs=1e-12)
    assert by_place != pytest.approx(interval(stat, pred, label), abs=1e-3)


def test_few_right_answers_are_no_certainty():
    for n in range(1, 30):
        low, high = interval(accuracy, np.ones(n), np.ones(n))
        assert np.isnan(low) and np.isnan(high) if n < 6 else low < .55+.45*(n > 6) and high == 1
    low, high = interval(accuracy, np.ones(300), np.ones(300), groups=np.arange(300) % 6) # six clusters count as six
    assert low == pytest.approx(.025**(1/6)) and high == 1


def test_clusters_widen():
    rng = np.random.default_rng(0)
    base = np.repeat(rng.random(20) < .6, 8).astype(float)
    alone, apart = interval(accuracy, base, np.ones(160)), interval(accuracy, base, np.ones(160), groups=np.repeat(np.arange(20), 8))
    assert apart[1]-apart[0] > 2*(alone[1]-alone[0])
    once = interval(accuracy, base[::8], np.ones(20))
    assert apart == pytest.approx(once, abs=.03) # eight copies of one answer are one answer


def test_groups_of_one_are_no_groups():
    rng = np.random.default_rng(1)
    x, y, names = rng.normal(size=15), rng.normal(size=15), [f'g{i}' for i in range(15)]
    for stat, *args in ((mean, x), (pearson, x, y), (accuracy, (x > 0).astype(float), (y > 0).astype(float)), (auroc, x, (y > 0).astype(float))):
        assert interval(stat, *args) == pytest.approx(interval(stat, *args, groups=names), abs=1e-12)


def test_intervals_stay_within_bounds_or_are_blank():
    rng = np.random.default_rng(2)
    for seed in range(40):
        x = rng.normal(size=8)
        y = x+rng.normal(size=8)*.05
        for stat, truth in ((pearson, y), (spearman, y), (kendall_tau_b, y), (auroc, (y > 0).astype(float))):
            low, high = interval(stat, x, truth)
            value = stat(x, truth)
            assert np.isnan(low) and np.isnan(high) or (-1 if stat is not auroc else 0) < low < value < high < 1
    assert np.isnan(interval(mean, np.full(9, .1))).all() and np.isnan(interval(pearson, np.ones(9), np.arange(9.))).all()
    assert np.isnan(interval(mean, [])).all() and np.isnan(interval(recall, np.zeros(9), np.zeros(9))).all()


@pytest.mark.parametrize('g, k', [(6, 1), (8, 4)])
def test_coverage(g, k):
    of, true = np.repeat(np.arange(g), k), dict(mean=0., share=.75, Spearman=6/np.pi*np.arcsin(.35))
    inside = {name: [] for name in true}
    for seed in range(150):
        rng = np.random.default_rng([seed, g, k])
        x = (rng.normal(size=g)[of]+rng.normal(size=g*k))/np.sqrt(2) if k > 1 else rng.normal(size=g)
        y = .7*x+np.sqrt(1-.49)*rng.normal(size=g*k)
        for name, got in dict(mean=interval(mean, x, groups=of), share=interval(mean, (x < .6745).astype(float), groups=of),
                              Spearman=interval(spearman, x, y, groups=of)).items():
            if not np.isnan(got[0]): inside[name].append(got[0] <= true[name] <= got[1])
    for name, hits in inside.items(): assert np.mean(hits) >= .95-3*np.sqrt(.05*.95/len(hits)), name


# ---- what cannot be counted

@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_missing_and_infinite_values_are_never_counted(bad):
    x, t, d = np.array([1., bad, 3.]), np.array([1., 0., 1.]), np.array([1., bad, 0.])
    calls = [lambda: mean(x), lambda: accuracy(d, t), lambda: accuracy(t, d), lambda: pearson(x, t), lambda: spearman(x, t), lambda: kendall_tau_b(t, x),
             lambda: stats.midranks(x), lambda: f1(d, t), lambda: recall(t, d), lambda: precision(d, t), lambda: auroc(x, t), lambda: stats.bias_scores(x),
             lambda: stats.mean_bias(x, list('aab')), lambda: interval(mean, np.tile(x, 5)), lambda: paired_p(AVERAGE, x, t), lambda: paired_p(pearson, t, t, x),
             lambda: stats.particle_summary(x, t)]
    for call in calls:
        with pytest.raises(ValueError, match='NaN or infinite'): call()
    assert np.isnan(stats.pair_decisions([bad, 1, bad], [1, bad, bad])).all() and np.isnan(stats.threshold_decisions([bad])).all()
    assert stats.best_particle([bad, 1., 0.]) == 1


def test_decisions_do_not_hang_on_rounding():
    s = np.round(np.arange(0, 5, .1), 1)
    assert (stats.pair_decisions(s, s+.1, .1) == .5).all() and (stats.pair_decisions(s, np.round(s+.2, 1), .1) == 1).all()
    assert stats.bias_scores(s[:2])['ACC'] == stats.bias_scores(s[30:32])['ACC'] == 1
