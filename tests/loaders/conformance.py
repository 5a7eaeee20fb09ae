"""What every loader does, whatever it reads from: one suite, inherited by the tests of each loader."""

import json
import pickle
import struct
import threading
from abc import abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from odewei.errors import OptionsError
from odewei.loaders import Span, WeightInfo, WeightsLoader, is_castable, read_tensor
from odewei.loaders.remote_file import RemoteFile
from odewei.loaders.tensors import DTYPES, contiguous_stride

SHAPES = [(), (1,), (7,), (0,), (3, 0, 2), (3, 5), (2, 1, 4, 3), (1, 1)]


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits, NaNs and subnormals among them."""
    count = 1
    for size in shape:
        count *= size
    bits = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.manual_seed(seed))
    return (bits % 2 if dtype is torch.bool else bits).view(dtype).view(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor in logical order, as bytes."""
    if tensor.numel() == 0:  # NumPy's empty arrays come with strides that a view cannot have
        return b""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape and bits."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert bits(found) == bits(expected)


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header: an object for JSON, a text, or bytes; ``length`` is the claimed one."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def read_bytes(loader: WeightsLoader, info: WeightInfo) -> bytes:
    """One weight through ``read_into``."""
    buffer = bytearray(info.nbytes)
    loader.read_into(info, memoryview(buffer))
    return bytes(buffer)


def span_bytes(span: Span) -> bytes:
    """What is at a span now, read without the loader."""
    if isinstance(span.file, RemoteFile):
        return fsspec_bytes(span.file)[span.offset : span.offset + span.nbytes]
    with open(span.file.path, "rb") as stream:
        stream.seek(span.offset)
        return stream.read(span.nbytes)


def fsspec_bytes(file: RemoteFile) -> bytes:
    """All of a remote file, read without odewei."""
    import fsspec

    filesystem = fsspec.filesystem(file.path.protocol, **file.path.remote.storage_options)
    content: bytes = filesystem.cat_file(file.path.url)
    return content


COMPLEX = {"C32": torch.complex32, "C128": torch.complex128}
"""dtypes that safetensors does not have and torch has."""


@pytest.mark.filterwarnings("ignore:ComplexHalf")
class LoaderConformance:
    """Inherit, name the class ``Test...``, and say how such a loader is made."""

    has_spans = True
    keeps_strides = False
    keeps_gaps = False
    dtypes = DTYPES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """The dtypes of the format."""
        if "dtype_name" in metafunc.fixturenames:
            metafunc.parametrize("dtype_name", sorted(self.dtypes))

    def kept_stride(self, tensor: torch.Tensor) -> tuple[int, ...]:
        """The stride that a tensor whose elements lie densely comes out with."""
        return tensor.stride() if self.keeps_strides else contiguous_stride(tensor.shape)

    @abstractmethod
    def make(self, tensors: dict[str, torch.Tensor], folder: Path, **options: object) -> WeightsLoader:
        """A loader of exactly these tensors, with whatever files it needs in ``folder``."""

    def test_every_dtype_comes_out_bit_for_bit(self, dtype_name: str, tmp_path: Path) -> None:
        """A tensor of each dtype of the format comes out with the same bits, NaN payloads included."""
        expected = random_tensor(self.dtypes[dtype_name], (5, 3))
        loader = self.make({"other": torch.zeros(3), "weight": expected}, tmp_path)
        assert_same(loader("module", ["weight"])["weight"], expected)

    def test_every_shape_comes_out(self, tmp_path: Path) -> None:
        """0-dim, empty and ordinary tensors come out with their shape, at any place among the others."""
        tensors = {f"w{i}": random_tensor(torch.float32, shape, i) for i, shape in enumerate(SHAPES)}
        found = self.make(tensors, tmp_path)("module", list(tensors))
        assert found.keys() == tensors.keys()
        for name, expected in tensors.items():
            assert_same(found[name], expected)
            assert found[name].stride() == expected.stride()

    def test_dense_strides_are_kept(self, tmp_path: Path) -> None:
        """Transposed and channels-last tensors have the right values, and their strides where the source has them."""
        image = random_tensor(torch.float16, (2, 3, 4, 5))
        tensors = {
            "transposed": random_tensor(torch.float16, (4, 6)).t(),
            "channels_last": image.contiguous(memory_format=torch.channels_last),
            "one_by_one": random_tensor(torch.float32, (4, 6, 1, 1)).to(memory_format=torch.channels_last),
            "odd_step": random_tensor(torch.float32, (2, 3)).as_strided((2, 1, 3), (3, 77, 1)),
            "permuted": random_tensor(torch.int64, (2, 3, 4)).permute(2, 0, 1),
        }
        found = self.make(tensors, tmp_path)("module", list(tensors))
        for name, expected in tensors.items():
            assert_same(found[name], expected)
            assert found[name].stride() == self.kept_stride(expected)

    def test_slices_and_expanded_tensors_have_the_right_values(self, tmp_path: Path) -> None:
        """Tensors that leave gaps in their storage or repeat it come out right."""
        base = random_tensor(torch.float32, (6, 8))
        tensors = {"rows": base[2:4], "columns": base[:, 1:4], "every_second": base[1::2, ::3], "row": base[5]}
        tensors["expanded"] = random_tensor(torch.float32, (1, 5)).expand(4, 5)
        found = self.make(tensors, tmp_path)("module", list(tensors))
        for name, expected in tensors.items():
            assert_same(found[name], expected)
            assert found[name].stride() == (expected.stride() if self.keeps_gaps else contiguous_stride(expected.shape))

    def test_names_of_the_checkpoint_become_those_of_the_model(self, tmp_path: Path) -> None:
        """A prefix is taken off, what lacks it is left out, the rest is renamed; infos keep the checkpoint's names."""
        tensors = {f"net.{name}": random_tensor(torch.float32, (3, 2), i) for i, name in enumerate("abc")}
        options = {"prefix": "net.", "rename": {"a": "x.y", "b": None}}
        loader = self.make({**tensors, "other": torch.ones(1)}, tmp_path, **options)
        assert {name: info.name for name, info in loader.weights().items()} == {"x.y": "net.a", "c": "net.c"}
        for copy in (loader, pickle.loads(pickle.dumps(loader))):
            found = copy("module", ["x.y", "c", "b", "a", "net.a"])
            assert found.keys() == {"x.y", "c"}
            assert_same(found["x.y"], tensors["net.a"])
            assert_same(found["c"], tensors["net.c"])

    def test_two_names_of_one_tensor_are_two_equal_weights(self, tmp_path: Path) -> None:
        """Tied tensors, and views of one storage, are found under every name."""
        tied = random_tensor(torch.float32, (4, 3))
        found = self.make({"a": tied, "b": tied, "c": tied[1:]}, tmp_path)("module", ["a", "b", "c"])
        for name, expected in {"a": tied, "b": tied, "c": tied[1:]}.items():
            assert_same(found[name], expected)

    def test_spans_say_where_the_bytes_are(self, tmp_path: Path) -> None:
        """A span, read by anybody, holds what read_into delivers; a source without files has no spans."""
        tensors = {f"w{i}": random_tensor(torch.float16, shape, i) for i, shape in enumerate(SHAPES)}
        loader = self.make(tensors, tmp_path)
        for info in loader.weights().values():
            assert (info.span is not None) == self.has_spans
            if info.span is not None:
                assert info.span.nbytes == info.nbytes
                assert span_bytes(info.span) == read_bytes(loader, info)

    def test_unknown_names_are_left_out(self, tmp_path: Path) -> None:
        """Asking for names that the checkpoint lacks is no error; they are not in the answer."""
        loader = self.make({"a": torch.ones(2)}, tmp_path)
        assert loader.locate(["b", "a"]).keys() == {"a"}
        assert loader("module", ["b", "a", ""]).keys() == {"a"}
        assert loader("module", []) == {}

    def test_weights_are_described_as_stored(self, tmp_path: Path) -> None:
        """Infos have name, dtype, shape and size in bytes, and are the same when asked again."""
        tensors = {f"w{i}": random_tensor(torch.float64, shape, i) for i, shape in enumerate(SHAPES)}
        loader = self.make(tensors, tmp_path)
        infos = loader.weights()
        assert infos == loader.weights()
        assert {(i.name, i.dtype, i.shape, i.nbytes) for i in infos.values()} == {
            (name, t.dtype, tuple(t.shape), t.numel() * 8) for name, t in tensors.items()
        }

    def test_a_checkpoint_without_weights_is_one(self, tmp_path: Path) -> None:
        """No weights at all is a checkpoint too."""
        assert dict(self.make({}, tmp_path).weights()) == {}

    def test_infos_and_loaders_can_be_pickled(self, tmp_path: Path) -> None:
        """An info, and a loader before and after use, come back from pickle and read the same."""
        expected = random_tensor(torch.float32, (3, 2))
        loader = self.make({"w": expected}, tmp_path)
        unused = pickle.loads(pickle.dumps(loader))
        info = loader.weights()["w"]
        assert pickle.loads(pickle.dumps(info)) == info
        for copy in (unused, pickle.loads(pickle.dumps(loader))):
            assert_same(copy("module", ["w"])["w"], expected)

    def test_many_threads_read_at_once(self, tmp_path: Path) -> None:
        """Threads that ask for headers and weights of one loader at the same time all get the right bytes."""
        tensors = {f"w{i}": random_tensor(torch.float32, (64, i + 1), i) for i in range(16)}
        loader = self.make(tensors, tmp_path)
        start = threading.Barrier(8)

        def work(_: int) -> bool:
            start.wait()
            infos = loader.weights()
            return all(read_bytes(loader, infos[name]) == bits(tensors[name]) for name in tensors for _ in range(5))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(work, range(8)))

    def test_close_twice_and_go_on(self, tmp_path: Path) -> None:
        """A loader may be closed before use, twice, and be used afterwards."""
        loader = self.make({"w": torch.ones(2)}, tmp_path)
        loader.close()
        before = read_bytes(loader, loader.weights()["w"])
        loader.close()
        loader.close()
        assert read_bytes(loader, loader.weights()["w"]) == before

    def test_tensors_are_aligned_own_and_ordinary(self, tmp_path: Path) -> None:
        """What is read lies at a multiple of 64 bytes, is nobody else's, and is no inference tensor."""
        loader = self.make({"odd": torch.ones(1, dtype=torch.int8), "w": torch.ones(3)}, tmp_path)
        with torch.inference_mode():
            first = loader("module", ["w"])["w"]
        second = loader("module", ["w"])["w"]
        assert first.data_ptr() % 64 == second.data_ptr() % 64 == 0
        assert first.data_ptr() != second.data_ptr()
        assert not first.is_inference()
        assert not first.requires_grad

    def test_dtype_casts_only_floating_weights_of_16_bits_and_more(self, tmp_path: Path) -> None:
        """The wished dtype changes f16 to f64 and nothing else."""
        tensors = {name: random_tensor(dtype, (4,)) for name, dtype in self.dtypes.items()}
        loader = self.make(tensors, tmp_path, dtype=torch.float32)
        assert loader.dtype is torch.float32
        for name, found in loader("module", list(tensors)).items():
            cast = tensors[name].dtype in {torch.float16, torch.bfloat16, torch.float32, torch.float64}
            assert is_castable(tensors[name].dtype) == cast
            assert_same(found, tensors[name].to(torch.float32) if cast else tensors[name])

    def test_dtype_of_one_read_wins_over_the_loader(self, tmp_path: Path) -> None:
        """A dtype given to read_tensor is used instead of the loader's."""
        loader = self.make({"w": torch.ones(3, dtype=torch.float16)}, tmp_path, dtype=torch.float32)
        assert read_tensor(loader, loader.weights()["w"], torch.float64).dtype is torch.float64

    def test_wishes_are_checked(self, tmp_path: Path) -> None:
        """The device may be text; a dtype that nothing can be cast to is refused with the cure."""
        assert self.make({}, tmp_path, device="cpu").device == torch.device("cpu")
        with pytest.raises(OptionsError, match=r"torch\.int8.*bfloat16"):
            self.make({}, tmp_path, dtype=torch.int8)

    def test_a_buffer_of_another_size_is_refused(self, tmp_path: Path) -> None:
        """read_into fills exactly the weight's bytes or nothing."""
        loader = self.make({"w": torch.ones(3)}, tmp_path)
        with pytest.raises(ValueError, match="12 bytes"):
            loader.read_into(loader.weights()["w"], memoryview(bytearray(11)))

    def test_repr_is_one_line_and_reads_nothing(self, tmp_path: Path) -> None:
        """repr works at any time, in one line, and names the class."""
        loader = self.make({"w": torch.ones(3)}, tmp_path)
        before = repr(loader)
        loader.weights()
        assert type(loader).__name__ in before
        assert "1 weights" in repr(loader)
        assert "\n" not in before + repr(loader)
