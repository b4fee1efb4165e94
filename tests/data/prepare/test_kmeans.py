"""Spherical k-means beside Lloyd's algorithm in float64, on one device and on eight."""

import jax
import numpy as np
import pytest

from baichuan_jax.config import MeshConfig
from baichuan_jax.data.prepare import kmeans
from baichuan_jax.parallel.mesh import make_mesh

N, D, K = 1_003, 24, 17


@pytest.fixture(scope="module")
def one():
    return make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])


@pytest.fixture(scope="module")
def eight():
    return make_mesh(MeshConfig(2, 2, 2))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def points(noise=0.6, blobs=K, size=N, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((blobs, D))
    labels = np.concatenate([np.arange(blobs), rng.integers(0, blobs, size - blobs)])
    x = unit(centres)[labels] + noise * rng.standard_normal((size, D)) / np.sqrt(D)
    return unit(x).astype(np.float32)


def lloyd(x, centroids, iterations):
    """What `fit` says it does, as plainly as it can be said."""
    x, centroids, labels = x.astype(np.float64), centroids.astype(np.float64), None
    for _ in range(iterations):
        cosines = x @ centroids.T
        before, labels, best = labels, cosines.argmax(1), cosines.max(1)
        if before is not None and (before == labels).all():
            break
        empty = []
        for k in range(len(centroids)):
            if (labels == k).any():
                centroids[k] = unit(x[labels == k].sum(0))
            else:
                empty.append(k)
        centroids[empty] = x[np.argsort(best, kind="stable")[: len(empty)]]
    return centroids


@pytest.mark.parametrize("mesh", ["one", "eight"])
@pytest.mark.parametrize("iterations", [1, 3, 20])
def test_like_float64(mesh, iterations, request):
    x = points(noise=1.5)
    start = x[:K]
    found, _ = kmeans.fit(
        x, K, iterations=iterations, start_KD=start, mesh=request.getfixturevalue(mesh)
    )
    np.testing.assert_allclose(found, lloyd(x, start, iterations), atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=1e-6)


def test_eight_devices_like_one(one, eight):
    x = points()
    (a, before), (b, after) = (kmeans.fit(x, K, seed=3, mesh=mesh) for mesh in (one, eight))
    np.testing.assert_allclose(a, b, atol=1e-6)
    np.testing.assert_allclose(before, after, rtol=1e-6)
    for mesh in (one, eight):
        labels, cosines = kmeans.assign(x, a, mesh)
        np.testing.assert_array_equal(labels, (x @ a.T).argmax(1))
        np.testing.assert_allclose(cosines, (x @ a.T).max(1), rtol=1e-6)
    assert labels.dtype == np.uint32 and cosines.dtype == np.float32


def test_the_same_again_and_another_seed(eight):
    x = points(noise=2.0)
    first, again, other = (kmeans.fit(x, K, seed=seed, mesh=eight)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)


def test_the_mean_cosine_grows_and_it_stops(one):
    x = points(noise=1.0)
    centroids, history = kmeans.fit(x, K, iterations=200, start_KD=x[:K], mesh=one)
    assert len(history) < 200 and (np.diff(history) > -1e-6).all() and history[-1] > history[0]
    np.testing.assert_allclose(kmeans.assign(x, centroids, one)[1].mean(), history[-1], rtol=1e-6)


@pytest.mark.parametrize("mesh", ["one", "eight"])
def test_clusters_without_points_start_again(mesh, request):
    x = points(noise=0.1, blobs=6)
    start = np.repeat(x[:1], 6, axis=0)  # all but the first of them get nothing
    mesh = request.getfixturevalue(mesh)
    found, _ = kmeans.fit(x, 6, start_KD=start, mesh=mesh)
    np.testing.assert_allclose(found, lloyd(x, start, 20), atol=2e-6)
    assert set(kmeans.assign(x, found, mesh)[0]) == set(range(6))


def test_half_precision_and_points_without_a_direction(eight):
    x = points().astype(np.float16)
    x[5] = 0
    found, _ = kmeans.fit(x, K, start_KD=x[10 : 10 + K], mesh=eight)
    np.testing.assert_allclose(found, lloyd(x, x[10 : 10 + K], 20), atol=1e-5)
    labels, cosines = kmeans.assign(x, found, eight)
    assert labels[5] == 0 and cosines[5] == 0 and np.isfinite(found).all()


def test_points_that_cancel_leave_the_centroid(one):
    x = np.eye(2, dtype=np.float32)[[0, 0]] * np.float32([[1], [-1]])
    found, _ = kmeans.fit(x, 1, start_KD=np.float32([[0, 1]]), mesh=one)
    np.testing.assert_array_equal(found, [[0, 1]])


def test_as_many_clusters_as_points_and_ties(one):
    x = unit(np.float32([[1, 0], [1, 1], [0, 1]]))
    found, history = kmeans.fit(x, 3, mesh=one)
    assert sorted(kmeans.assign(x, found, one)[0]) == [0, 1, 2]
    np.testing.assert_allclose(history[-1], 1, rtol=1e-6)
    labels, _ = kmeans.assign(x[:1], np.repeat(x[:1], 3, axis=0), one)
    assert labels.tolist() == [0]


@pytest.mark.parametrize("size", [0, 1, 129, 700])
def test_assign_in_batches(size, eight, monkeypatch):
    monkeypatch.setattr(kmeans, "_BATCH_BYTES", 4 * D * 2**5)
    monkeypatch.setattr(kmeans, "_tile", lambda clusters: 16)
    x = points()
    labels, cosines = kmeans.assign(x[:size], x[:K], eight)
    np.testing.assert_array_equal(labels, (x[:size] @ x[:K].T).argmax(1))
    assert cosines.shape == (size,)


@pytest.mark.parametrize("clusters", [0, N + 1])
def test_refuses(clusters, one):
    with pytest.raises(ValueError, match=f"clusters={clusters} must be between 1 and the {N}"):
        kmeans.fit(points(), clusters, mesh=one)
