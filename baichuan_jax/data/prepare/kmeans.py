"""Spherical k-means in JAX, the points divided over the devices of a mesh (§2.1: clustering).

A cluster is a direction: points and centroids have length one, and a point belongs to the
centroid of the largest cosine. An iteration is a matrix product, an argmax and a
`segment_sum` on each device, and one `psum` of the sums over all of them.

Legend: N points, n of them at a time, D width, K clusters.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax import P
from jax.sharding import NamedSharding

from baichuan_jax.config import MeshConfig
from baichuan_jax.parallel.mesh import AXES, make_mesh

_COSINES = 1 << 24  # that exist at one time on a device: 64 MB
_BATCH_BYTES = 1 << 26  # of points given to a device at one time by `assign`


def fit(
    points_ND: np.ndarray,
    clusters: int,
    *,
    iterations: int = 20,
    seed: int = 0,
    mesh: jax.sharding.Mesh | None = None,
    start_KD: np.ndarray | None = None,
) -> tuple[np.ndarray, list[float]]:
    """Finds centroids by Lloyd's algorithm, until no point changes its cluster.

    It starts from points drawn by the seed. A cluster that loses all its points starts again
    from one of the points that are farthest from their centroids.

    Args:
      points_ND: rows of length one, or zero; float16 or float32.
      clusters: K, at most N.
      iterations: at most so many.
      mesh: with the project's axes, all of which the points are divided over; None: of all
        devices of this process.
      start_KD: centroids to start from, instead of those drawn.

    Returns:
      Centroids [K, D], float32 of length one, and the mean cosine of the points with their
      centroids before each update, which only grows (but for a cluster that starts again).

    Raises:
      ValueError: there are fewer points than clusters.
    """
    N = len(points_ND)
    if not 1 <= clusters <= N:
        raise ValueError(f"clusters={clusters} must be between 1 and the {N} points there are.")
    if start_KD is None:
        drawn = np.random.default_rng(seed).choice(N, clusters, replace=False)
        start_KD = points_ND[np.sort(drawn)]
    mesh = mesh or make_mesh(MeshConfig())
    tile = min(_tile(clusters), -(-N // mesh.size))
    points = _place(points_ND, mesh, -(-N // (tile * mesh.size)) * tile)
    centroids_KD, labels_N, history = np.asarray(start_KD, np.float32), None, []
    for _ in range(iterations):
        before = labels_N
        new_KD, counts_K, labels_N, cosines_N = jax.device_get(
            _iterate(centroids_KD, points, N, mesh, tile)
        )
        labels_N, cosines_N = labels_N[:N], cosines_N[:N]
        history.append(float(cosines_N.mean(dtype=np.float64)))
        if before is not None and (before == labels_N).all():
            break
        centroids_KD = np.array(new_KD)
        if len(empty := np.flatnonzero(counts_K == 0)):
            farthest = np.argsort(cosines_N, kind="stable")[: len(empty)]
            centroids_KD[empty] = points_ND[farthest]
            logging.info("k-means: %d clusters without points start again.", len(empty))
    return centroids_KD, history


def assign(
    points_ND: np.ndarray, centroids_KD: np.ndarray, mesh: jax.sharding.Mesh | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each point, in batches of one shape.

    Returns:
      Its number [N], uint32 (the lower one where two are equally near), and the cosine with it
      [N], float32.
    """
    mesh = mesh or make_mesh(MeshConfig())
    K, D = centroids_KD.shape
    tile = _tile(K)
    most = max(1, _BATCH_BYTES // (4 * D * tile))
    needed = -(-len(points_ND) // (tile * mesh.size))
    rows = tile * min(most, 1 << max(0, needed - 1).bit_length())  # few shapes, little padding
    size = rows * mesh.size
    labels, cosines = [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for first in range(0, len(points_ND), size):
        batch = points_ND[first : first + size]
        found = jax.device_get(_assign(centroids_KD, _place(batch, mesh, rows), mesh, tile))
        labels.append(found[0][: len(batch)])
        cosines.append(found[1][: len(batch)])
    return np.concatenate(labels).astype(np.uint32), np.concatenate(cosines)


def _tile(clusters: int) -> int:
    """Points whose cosines with all centroids exist at one time: a power of two."""
    return 1 << max(7, min(12, (_COSINES // clusters).bit_length() - 1))


def _place(points_ND: np.ndarray, mesh: jax.sharding.Mesh, rows: int) -> jax.Array:
    """The points on the devices, `rows` on each, with zeros behind them."""
    padded = np.zeros((rows * mesh.size, points_ND.shape[1]), points_ND.dtype)
    padded[: len(points_ND)] = points_ND
    return jax.device_put(padded, NamedSharding(mesh, P(AXES, None)))


def _nearest(centroids_KD: jax.Array, tile_nD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """As `argmax` and `max`; on a CPU two plain reductions are faster than the first."""
    cosines_nK = jnp.einsum("nd,kd->nk", tile_nD.astype(jnp.float32), centroids_KD)
    best_n = jnp.max(cosines_nK, axis=1)
    K = len(centroids_KD)
    numbers_nK = jnp.where(cosines_nK == best_n[:, None], jnp.arange(K, dtype=jnp.int32), K - 1)
    return jnp.min(numbers_nK, axis=1), best_n


def _tiles(points_ND: jax.Array, tile: int) -> jax.Array:
    return points_ND.reshape(-1, tile, points_ND.shape[1])


@functools.partial(jax.jit, static_argnames=("mesh", "tile"))
def _assign(centroids_KD, points_ND, mesh, tile):
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(AXES, None)),
        out_specs=(P(AXES), P(AXES)),
        check_vma=False,
    )
    def on_device(centroids_KD, points_ND):
        nearest = functools.partial(_nearest, centroids_KD)
        labels, cosines = jax.lax.map(nearest, _tiles(points_ND, tile))
        return labels.reshape(-1), cosines.reshape(-1)

    return on_device(centroids_KD, points_ND)


@functools.partial(jax.jit, static_argnames=("mesh", "tile"))
def _iterate(centroids_KD, points_ND, N, mesh, tile):
    """New centroids, the sizes of the clusters, and each point's cluster and cosine with it."""
    K, D = centroids_KD.shape

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(AXES, None), P()),
        out_specs=(P(), P(), P(AXES), P(AXES)),
        check_vma=False,
    )
    def on_device(centroids_KD, points_ND, N):
        rows = len(points_ND)
        real = jax.lax.axis_index(AXES) * rows + jnp.arange(rows) < N

        def one(carry, inputs):
            sums_KD, counts_K = carry
            tile_nD, real_n = inputs
            labels_n, cosines_n = _nearest(centroids_KD, tile_nD)
            kept_n = jnp.where(real_n, labels_n, K)  # segment K is none
            sums_KD += jax.ops.segment_sum(tile_nD.astype(jnp.float32), kept_n, K)
            counts_K += jax.ops.segment_sum(jnp.ones_like(kept_n), kept_n, K)
            return (sums_KD, counts_K), (labels_n, cosines_n)

        zeros = (jnp.zeros((K, D), jnp.float32), jnp.zeros(K, jnp.int32))
        inputs = (_tiles(points_ND, tile), real.reshape(-1, tile))
        sums, (labels, cosines) = jax.lax.scan(one, zeros, inputs)
        return *jax.lax.psum(sums, AXES), labels.reshape(-1), cosines.reshape(-1)

    sums_KD, counts_K, labels_N, cosines_N = on_device(centroids_KD, points_ND, N)
    length_K1 = jnp.linalg.norm(sums_KD, axis=1, keepdims=True)
    # Points that cancel each other say no direction: the centroid stays as it was.
    new_KD = jnp.where(length_K1 > 1e-12, sums_KD / jnp.maximum(length_K1, 1e-12), centroids_KD)
    return new_KD, counts_K, labels_N, cosines_N
