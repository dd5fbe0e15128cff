"""Checkpoints: Orbax writes the bytes, this layer knows whether they are the right ones.

    checkpoints/00000500/          one Orbax checkpoint, committed by a rename
    checkpoints/00000500.json      its manifest: SHA-256 of every leaf, the run's notes, and its own SHA-256

The manifest is written last, so a step exists if and only if its manifest does: a save that fails or is killed leaves
nothing that `steps` names. `load` checks every leaf against the manifest and passes a damaged step over for the newest
intact one. A checkpoint holds nested dicts of arrays and nothing else. Saving copies the state to the host, then hashes
and writes it in a thread while training goes on; `poll` hands back what came of it.
"""

import hashlib
import json
import logging
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from experiments.files import read_json, write_json
from experiments.sharding import paths

log = logging.getLogger("archloom")


class Damaged(Exception):
    """A checkpoint that is not what was saved."""


def digest(leaf: Any) -> str:
    """SHA-256 over dtype, shape and bytes in C order."""
    array = np.asarray(leaf)
    header = f"{array.dtype.name} {array.shape} ".encode()
    return hashlib.sha256(header + np.ascontiguousarray(array).tobytes()).hexdigest()


def param_hash(params: Any) -> str:
    """SHA-256 over the parameters' bytes in path order: equal if and only if every bit is."""
    total = hashlib.sha256()
    for _, leaf in sorted(paths(params).items()):
        total.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
    return total.hexdigest()


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


class Checkpoints:
    """The checkpoints of one run. Keeps the `keep` newest and the best.

    `notes` of a save is plain data kept in its manifest; the step in notes["best"]["step"] of the newest checkpoint is
    the best one and is not deleted.
    """

    def __init__(self, folder: str | Path, *, keep: int = 2, write: Callable[..., None] = ocp.save):
        self.folder, self.keep, self._write = Path(folder).resolve(), keep, write
        self._thread: threading.Thread | None = None
        self._failure: tuple[int, BaseException] | None = None

    def steps(self) -> list[int]:
        """Steps whose save was completed, oldest first."""
        return sorted(int(file.stem) for file in self.folder.glob("[0-9]*.json") if file.stem.isdigit())

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the best validation accuracy, as the newest readable manifest tells it."""
        for step in reversed(self.steps()):
            try:
                best = self.notes(step).get("best")
            except Damaged:
                continue
            return best["step"] if best else None
        return None

    # Saving

    def save(self, step: int, state: Any, notes: Mapping[str, Any]) -> None:
        """Starts a save of the state as it is now; the caller may donate the state once this returns."""
        self.wait()
        leaves = {path: np.array(leaf) for path, leaf in paths(state).items()}  # copies: donation reuses the buffers
        frozen = json.loads(json.dumps(notes))
        self._thread = threading.Thread(target=self._save, args=(step, leaves, frozen), name=f"save-{step}")
        self._thread.start()

    def wait(self) -> None:
        """Until the save under way has ended; `poll` then tells how."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def poll(self) -> tuple[int, BaseException] | None:
        """The step and the error of a save that failed since the last call."""
        failure, self._failure = self._failure, None
        return failure

    def _save(self, step: int, leaves: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._manifest(step).unlink(missing_ok=True)  # a step that is written anew does not exist meanwhile
            entry = {path: {"sha256": digest(x), "dtype": x.dtype.name, "shape": x.shape} for path, x in leaves.items()}
            self._write(self._bytes(step), nested(leaves), overwrite=True)
            body = {"step": step, "notes": notes, "leaves": entry}
            write_json(self._manifest(step), {"body": body, "sha256": _sha(body)})
            self._prune(notes)
        except BaseException as error:  # whatever it was, the training loop is told
            self._failure = (step, error)

    def _prune(self, notes: Mapping[str, Any]) -> None:
        best = (notes.get("best") or {}).get("step")
        for step in self.steps()[: -self.keep]:
            if step != best:
                self.delete(step)

    def delete(self, step: int) -> None:
        self._manifest(step).unlink(missing_ok=True)  # first: from here on the step does not exist
        shutil.rmtree(self._bytes(step), ignore_errors=True)

    def sweep(self) -> None:
        """Removes what interrupted saves left behind. Only the process that trains may call this."""
        known = {self._bytes(step) for step in self.steps()}
        for path in self.folder.glob("*"):
            if path.is_dir() and path not in known:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix == ".tmp":
                path.unlink(missing_ok=True)

    # Loading

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """The shape of every leaf of this step by path, from its manifest alone."""
        return {path: tuple(entry["shape"]) for path, entry in self._body(step)["leaves"].items()}

    def notes(self, step: int) -> dict[str, Any]:
        return self._body(step)["notes"]

    def load(self, abstract: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, notes) of the newest intact step; None if there is none.

        Args:
          abstract: the state's structure, with the shardings to load to; leaves as jax.ShapeDtypeStruct. It may be a
            part of what was saved ({"params": ...}); the rest is then not read.
        """
        for step in reversed(self.steps()):
            try:
                return self.load_step(step, abstract)
            except Damaged as error:
                log.warning("checkpoint %d passed over: %s", step, error)
        return None

    def load_step(self, step: int, abstract: Any) -> tuple[int, Any, dict[str, Any]]:
        """This step and no other; Damaged if it is not intact."""
        return step, self._load(step, abstract), self.notes(step)

    def _load(self, step: int, abstract: Any) -> Any:
        saved, wanted = self._body(step)["leaves"], paths(abstract)
        for path, leaf in wanted.items():
            entry = saved.get(path)
            if (
                entry is None
                or tuple(entry["shape"]) != tuple(leaf.shape)
                or entry["dtype"] != np.dtype(leaf.dtype).name
            ):
                found = "absent" if entry is None else f"{entry['dtype']}{tuple(entry['shape'])}"
                raise Damaged(f"{path} is {found} in {self._bytes(step)}, wanted {leaf.dtype}{tuple(leaf.shape)}")
        placeholders = {path: ocp.PLACEHOLDER for path in saved if path not in wanted}
        try:
            tree = ocp.load(self._bytes(step), nested({**wanted, **placeholders}))
        except Exception as error:  # Orbax raises many kinds for a file that is cut or gone
            raise Damaged(f"cannot be read: {type(error).__name__}: {str(error).splitlines()[0][:200]}") from error
        leaves = {path: leaf for path, leaf in paths(tree).items() if path in wanted}
        for path, leaf in leaves.items():
            if digest(leaf) != saved[path]["sha256"]:
                raise Damaged(f"{path} is not what was saved: its SHA-256 differs from the manifest's")
        return jax.tree.unflatten(jax.tree.structure(abstract), [leaves[path] for path in wanted])

    def _body(self, step: int) -> dict[str, Any]:
        try:
            manifest = read_json(self._manifest(step))
            body = manifest["body"]
            intact = manifest["sha256"] == _sha(body) and body["step"] == step
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"manifest cannot be read: {type(error).__name__}: {error}") from error
        if not intact:
            raise Damaged("manifest is not what was saved: its SHA-256 differs")
        return body

    def _manifest(self, step: int) -> Path:
        return self.folder / f"{step:08d}.json"

    def _bytes(self, step: int) -> Path:
        return self.folder / f"{step:08d}"


def _sha(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
