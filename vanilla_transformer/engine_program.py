"""Compiles, caches and loads the program engine_compiled.cpp.

It is compiled at its first use on a machine, which takes about ten seconds, and kept in the user's cache folder. If
that folder cannot be used, each process compiles its own. `load` waits for the compiler; `load_soon` never does.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch


SOURCE = Path(__file__).with_name("engine_compiled.cpp")
HEADER = Path(__file__).with_name("engine_instructions.h")
FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fopenmp-simd", "-pthread"]
COMPILERS = ("g++", "clang++", "c++")

_INDEX, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class ProgramError(ValueError):
    """The program cannot be compiled or loaded on this machine. The message says why, and what would help."""


def _structure(*fields: tuple[Any, str]) -> type[ctypes.Structure]:
    """A structure with these fields: pairs of a type and one or more names."""
    return type(
        "Structure", (ctypes.Structure,), {"_fields_": [(n, kind) for kind, names in fields for n in names.split()]}
    )


# These must match the structures in engine_compiled.cpp. `_loaded` checks that they do.
Sizes = _structure(
    (_INDEX, "d_model source_vocabulary vocabulary"),
    (_INDEX, "encoder_layers encoder_heads encoder_ffn decoder_layers decoder_heads decoder_ffn"),
    (_INDEX, "encoder_d_k encoder_d_v decoder_d_k decoder_d_v"),
    (_INDEX, "normalize_before int8 activation"),
    (_FLOAT, "eps encoder_scale decoder_scale"),
)
Weight = _structure((_POINTER, "numbers"), (_INDEX, "count"))
Job = _structure(
    (_INDEX, "sentences threads"),
    (_POINTER, "source source_starts encoder_positions decoder_positions"),
    (_INDEX, "encoder_position_count decoder_position_count"),
    (_POINTER, "prefix"),
    (_INDEX, "prefix_length max_length min_length"),
    (_POINTER, "eos"),
    (_INDEX, "eos_count beams early_stopping"),
    (_POINTER, "length_penalties"),
    (_INDEX, "returned"),
    (_POINTER, "sequences scores lengths lineage"),
    (_POINTER, "release_interpreter take_interpreter check_signals"),
)


def compiler_flags() -> list[str]:
    """
    The flags for this processor's instruction set, or for a smaller one if `ATEN_CPU_CAPABILITY` (`avx2` or `default`)
    limits torch to it.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return _arm_flags()
    found = torch.backends.cpu.get_cpu_capability()
    if found == "AVX512":
        vnni = ["-mavx512vnni"] if torch.cpu._is_vnni_supported() else []
        return ["-march=x86-64-v4", "-mprefer-vector-width=512", *vnni]
    if found == "AVX2":
        vnni = ["-mavxvnni"] if torch.cpu.get_capabilities().get("avx_vnni") else []
        return ["-march=x86-64-v3", *vnni]
    return []


def _arm_flags() -> list[str]:
    """Linux lists the instructions (asimddp: dot products). Apple's compiler needs no flags."""
    cpuinfo = Path("/proc/cpuinfo")
    features = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return ["-march=armv8.2-a+dotprod"] if "asimddp" in features else []


def _compiler() -> list[str]:
    """
    Raises:
        ProgramError: there is no compiler.
    """
    if os.name != "posix":
        raise ProgramError("the compiled program needs Linux or macOS")
    if chosen := os.environ.get("CXX"):
        return shlex.split(chosen)
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise ProgramError(f"there is no C++ compiler ({', '.join(COMPILERS)}, or the one that CXX names): install g++")


class _Program:
    """The program's compiler, command and cached file."""

    def __init__(self) -> None:
        """
        Raises:
            ProgramError: there is no compiler, or no source (code from the Hub comes without it).
        """
        self.compiler = _compiler()
        self.command = [*self.compiler, *FLAGS, *compiler_flags(), "-shared", str(SOURCE)]
        try:
            text = SOURCE.read_bytes() + HEADER.read_bytes()
        except OSError as error:
            raise ProgramError(f"the source is missing ({error}): install vanilla_transformer with pip") from error
        self.key = _digest(text + repr(self.command).encode())

    def cached(self) -> ctypes.PyDLL | None:
        """
        Loads the program from the cache folder, if it is there. A damaged file, which a crash or a full disk may leave,
        is deleted, because running it would kill the process. A file that this machine cannot load is kept: it may
        belong to another machine that shares the home folder.

        Raises:
            ProgramError: another user could have written the file.
        """
        folder = _cache_folder()
        for file in sorted(folder.glob(f"{self.key}-*.so")) if folder else ():
            with suppress(OSError):  # another process may have deleted it
                _refuse_foreign(file)
                if file.stem != self._stem(file):
                    file.unlink()
                    continue
                with suppress(ProgramError):
                    return _loaded(file)
        return None

    def compiled(self) -> ctypes.PyDLL:
        """
        Compiles, loads and caches it: writes a temporary file and renames it, since other processes may do the same.

        Raises:
            ProgramError: it cannot be compiled, written or loaded.
        """
        folder = _cache_folder()
        folder = folder if folder and os.access(folder, os.W_OK) else None
        try:
            with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as beside:
                file = Path(beside) / "program.so"
                self._run([*self.command, "-o", str(file)])
                library = _loaded(file)  # a loaded file may be moved or deleted
                if folder is not None:
                    file.replace(folder / f"{self._stem(file)}.so")
                return library
        except OSError as error:
            raise ProgramError(f"the compiled program cannot be written: {error}") from error

    def _stem(self, file: Path) -> str:
        """The name that a file with this content must have."""
        return f"{self.key}-{_digest(file.read_bytes())}"

    def _run(self, command: list[str]) -> None:
        try:
            # `_why_failed` expects messages in English.
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
        except OSError as error:
            raise ProgramError(f"the C++ compiler {self.compiler[0]} cannot be run: {error}") from error
        if done.returncode:
            raise ProgramError(f"the C++ compiler {self.compiler[0]} {_why_failed(done)}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _why_failed(done: subprocess.CompletedProcess) -> str:
    """Why the compiler failed."""
    if done.returncode < 0:
        return f"was killed by {signal.Signals(-done.returncode).name}: is there enough memory?"
    for line in done.stderr.splitlines():
        if "No space left on device" in line or "quota exceeded" in line:
            return f"failed because the disk is full: {line.strip()}"
        # From a killed child: "Killed signal terminated program cc1plus", "ld terminated with signal 9 [Killed]",
        # "unable to execute command: Killed".
        if ("signal" in line and "terminated" in line) or "unable to execute command" in line:
            return f"crashed: {line.strip()}: is there enough memory?"
    output = done.stderr[-2000:]
    return f"failed with exit status {done.returncode}; set CXX to one that supports C++20\n{output}".rstrip()


def _cache_folder() -> Path | None:
    """
    The user's own folder for compiled programs. None if there is none, or if programs cannot be loaded from it.

    Raises:
        ProgramError: another user could write into it.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vanilla_transformer"
        with suppress(OSError):  # a read-only folder will do if it exists
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if folder.stat().st_uid == os.getuid():
                folder.chmod(0o700)
        if not folder.is_dir() or _is_noexec(folder):
            return None
    except (OSError, RuntimeError):  # no access to the parent folder, or no home folder
        return None
    _refuse_foreign(folder)
    return folder


def _is_noexec(path: Path) -> bool:
    """Whether the file system is mounted noexec, so that no program can be loaded from it."""
    return bool(os.statvfs(path).f_flag & getattr(os, "ST_NOEXEC", 0))


def _refuse_foreign(path: Path) -> None:
    found = path.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ProgramError(
            f"{path} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}, so somebody else could "
            f"have written it: delete it, or set XDG_CACHE_HOME to a folder of your own"
        )


def _loaded(file: Path) -> ctypes.PyDLL:
    """
    Raises:
        ProgramError: it cannot be loaded, or its structures differ from those above.
    """
    try:
        # PyDLL, because Python then checks for exceptions after each call, such as KeyboardInterrupt.
        library = ctypes.PyDLL(str(file))
        functions = [library.vt_create, library.vt_search, library.vt_destroy, library.vt_message, library.vt_layout]
    except (OSError, AttributeError) as error:
        why = f"{file.parent} is on a file system mounted noexec, set TMPDIR to another" if _is_noexec(file) else error
        raise ProgramError(f"the compiled program cannot be loaded: {why}") from error
    create, search, destroy, message, layout = functions
    create.argtypes, create.restype = [_POINTER, _POINTER, _INDEX, _POINTER], _INDEX
    search.argtypes, search.restype = [_POINTER, _POINTER], _INDEX
    destroy.argtypes, destroy.restype = [_POINTER], None
    message.argtypes, message.restype = [], ctypes.c_char_p
    layout.argtypes, layout.restype = [_INDEX], ctypes.POINTER(_INDEX)
    for number, structure in enumerate((Sizes, Job)):
        names = [name for name, *_ in structure._fields_]  # type: ignore[attr-defined]
        ours = [ctypes.sizeof(structure), *(getattr(structure, name).offset for name in names)]
        theirs = layout(number)[: len(ours)]
        if ours != theirs:
            raise ProgramError(f"the compiled program lays out its data as {theirs}, Python as {ours}: reinstall it")
    return library


_lock = threading.Lock()
_future: Future | None = None


def load() -> ctypes.PyDLL:
    """
    Returns the program, and compiles it first if necessary.

    Raises:
        ProgramError: it cannot be compiled or loaded here.
    """
    return _started().result()


def load_soon() -> ctypes.PyDLL | None:
    """
    Returns the program if it is ready, else None. The first call starts to compile it in a thread.

    Raises:
        ProgramError: it cannot be compiled or loaded here.
    """
    future = _started()
    return future.result() if future.done() else None


def load_if_possible() -> None:
    """Waits for the compiler, for commands that decode a lot. If there is no program, `generate()` warns."""
    with suppress(ProgramError):
        load()


def _started() -> Future:
    global _future
    with _lock:
        if _future is None:
            _future = _start()
        return _future


def _start() -> Future:
    """Loads a cached program at once, or starts to compile it in a thread."""
    future: Future = Future()

    def compile_it(program: _Program) -> None:
        try:
            future.set_result(program.compiled())
        except BaseException as error:
            future.set_exception(error)

    try:
        program = _Program()
        if library := program.cached():
            future.set_result(library)
        else:
            threading.Thread(target=compile_it, args=(program,), name="compiling").start()
    except ProgramError as error:
        future.set_exception(error)
    return future


def forget() -> None:
    """Starts over at the next call: for tests, and after a fork, because the compiling thread is not in the child."""
    global _future, _lock
    _future, _lock = None, threading.Lock()


if os.name == "posix":
    os.register_at_fork(after_in_child=forget)
