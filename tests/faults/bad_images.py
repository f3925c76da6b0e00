"""Images that cannot be read, in each of the ways that people meet."""

from PIL import Image


def truncate(path):
    path.write_bytes(path.read_bytes()[:300])


def bomb(path):
    Image.new("1", (20000, 20000)).save(path)


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere.png")


DAMAGES = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "decompression bomb": bomb,
    "dangling link": dangling,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}
