"""Files that go wrong, each with the fault it stands for. Everything is drawn from a seed; nothing is downloaded.

`corpus(rng, times)` yields `Bad` files; `lay_out` writes them between good images. What must become of each:

- `out`: left out and named;
- `kept`: it is an image, whatever its name or mode says;
- `whole`: left out and named, or else pixel for pixel the image it was made from (never half of it);
- `block`: the same, but the last block of 16 × 16 pixels may be spoilt: where a JPEG ends within that, its decoder makes up the rest;
- `any`: left out and named, or some image: a flipped bit cannot always be seen.
"""
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Bad:
    fault: str
    name: str
    data: bytes
    fate: str
    says: str = ""  # words that the sentence about it must hold
    like: str = ""  # the image it was made from, for `whole` and `block`


def blob(rng, size=(96, 80), mode="RGB"):
    "A smooth random image, unlike any other."
    x = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return x.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(im, kind, **options):
    im.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


FORMATS = {
    "jpg": ("JPEG", {"quality": 90}), "progressive.jpg": ("JPEG", {"quality": 90, "progressive": True}), "png": ("PNG", {}),
    "gif": ("GIF", {}), "bmp": ("BMP", {}), "webp": ("WEBP", {"quality": 85}), "tif": ("TIFF", {}),
    "lzw.tif": ("TIFF", {"compression": "tiff_lzw"}), "ppm": ("PPM", {})}


def wholes(rng):
    "One sound image of every format; those below are damaged copies of them."
    return {ext: encoded(blob(rng), kind, **options) for ext, (kind, options) in FORMATS.items()}


def truncated(whole, rng, times):
    "Cut at every tenth of the length, and, in the long form, at random places besides."
    for ext, data in whole.items():
        cuts = [len(data) * k // 10 for k in range(1, 10)] + [int(c) for c in rng.integers(1, len(data) - 1, 9 * (times - 1))]
        for k, cut in enumerate(cuts):
            yield Bad("truncated", f"cut{k}.{ext}", data[:cut], "whole", like=ext)
        if "jpg" in ext:
            for k, cut in enumerate(cuts):
                fate = "any" if "progressive" in ext else "block"
                yield Bad("truncated, then closed", f"closed{k}.{ext}", data[:cut] + b"\xff\xd9", fate, like=ext)


def flipped(data, rng, start, stop, bits):
    x = np.frombuffer(data, np.uint8).copy()
    for at in rng.integers(start, stop, bits):
        x[at] ^= 1 << rng.integers(8)
    return x.tobytes()


def flips(whole, rng, times):
    for ext, data in whole.items():
        head = min(64, len(data) // 4)
        for k in range(5 * times):
            yield Bad("bit flips in the header", f"head{k}.{ext}", flipped(data, rng, 0, head, 1 + k % 4), "any")
            yield Bad("bit flips in the body", f"body{k}.{ext}", flipped(data, rng, head, len(data), 1 + k % 4),
                      "whole" if ext == "png" else "any", like=ext)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, body):
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)) + \
        chunk(b"IDAT", body) + chunk(b"IEND", b"")


def zeros(n):
    "n zero bytes, deflated, without ever holding them."
    z, out = zlib.compressobj(9), []
    for _ in range(n >> 20):
        out.append(z.compress(bytes(1 << 20)))
    return b"".join(out) + z.compress(bytes(n & 0xfffff)) + z.flush()


def bombs(rng):
    "Small files that are large images, and heads that promise more than there is."
    side = 12_000  # 144 million pixels: PIL warns, and would decode 0.4 to 1.2 GB
    yield Bad("decompression bomb", "bomb-rgb.png", png(side, side, 8, 2, zeros(side * (side * 3 + 1))), "out", "million pixels")
    yield Bad("decompression bomb", "bomb-grey.png", png(side, side, 8, 0, zeros(side * (side + 1))), "out", "million pixels")
    yield Bad("decompression bomb", "bomb-1bit.png", png(13_000, 13_000, 1, 0, zeros(13_000 * (13_000 // 8 + 1))), "out", "million pixels")
    yield Bad("decompression bomb", "bomb-over.png", png(30_000, 30_000, 1, 0, zeros(30_000 * (30_000 // 8 + 1))), "out", "million pixels")
    end, text = chunk(b"IEND", b""), chunk(b"zTXt", b"k\0\0" + zeros(1 << 28))
    yield Bad("decompression bomb", "bomb-text.png", png(8, 8, 8, 0, zlib.compress(bytes(72))).replace(end, text + end), "any")
    gif = bytearray(encoded(blob(rng, (16, 16)), "GIF"))
    gif[6:10] = struct.pack("<HH", 65_500, 65_500)
    yield Bad("decompression bomb", "bomb.gif", bytes(gif), "out", "million pixels")
    bmp = bytearray(encoded(blob(rng, (16, 16)), "BMP"))
    for k, (w, h) in enumerate(((9_000, 9_000), (11_000, 11_000), (2_000_000, 2_000_000), (1, 2**31 - 1), (2**31 - 1, 1))):
        bmp[18:26] = struct.pack("<ii", w, h)
        yield Bad("huge dimensions", f"huge{k}.bmp", bytes(bmp), "out")
    jpg = encoded(blob(rng), "JPEG")
    at = jpg.index(b"\xff\xc0") + 5
    for k, (h, w) in enumerate(((65_500, 65_500), (13_000, 13_000), (65_500, 8), (0, 0))):
        yield Bad("huge dimensions", f"huge{k}.jpg", jpg[:at] + struct.pack(">HH", h, w) + jpg[at + 4:], "out")
    for k, (w, h) in enumerate(((2**31 - 1, 2**31 - 1), (100_000, 100_000), (0, 10), (2**31 - 1, 1))):
        yield Bad("huge dimensions", f"huge{k}.png", png(w, h, 8, 2, zlib.compress(bytes(100))), "out")
    yield Bad("huge dimensions", "huge.ppm", b"P6 60000 60000 255\n" + bytes(100), "out", "million pixels")
    yield Bad("huge dimensions", "huge2.ppm", b"P6 9000 9000 255\n" + bytes(100), "out")


def odd_modes(rng):
    "Sound images that a naive reader gets wrong."
    odd = "16-bit, CMYK, palette, float, alpha"
    def kept(name, data): return Bad(odd, name, data, "kept")
    deep = (np.asarray(blob(rng, mode="L")).astype(np.uint16) * 257)
    yield kept("deep.png", encoded(Image.fromarray(deep), "PNG"))
    yield kept("deep.tif", encoded(Image.fromarray(deep), "TIFF"))
    yield kept("int.tif", encoded(Image.fromarray(deep.astype(np.int32) * 999), "TIFF"))
    yield kept("float.tif", encoded(Image.fromarray(deep.astype(np.float32)), "TIFF"))
    holes = deep.astype(np.float32)
    holes[:20], holes[20:24] = np.nan, np.inf
    yield kept("holes.tif", encoded(Image.fromarray(holes), "TIFF"))
    yield Bad(odd, "nan.tif", encoded(Image.fromarray(np.full_like(holes, np.nan)), "TIFF"), "out", "no number")
    yield kept("inks.jpg", encoded(blob(rng, mode="CMYK"), "JPEG"))
    yield kept("inks.tif", encoded(blob(rng, mode="CMYK"), "TIFF"))
    palette = blob(rng).quantize(16)
    yield kept("clear.gif", encoded(palette, "GIF", transparency=3))
    yield kept("clear.png", encoded(palette, "PNG", transparency=3))
    yield kept("clear-bytes.png", encoded(palette, "PNG", transparency=bytes(range(0, 256, 16))))
    yield kept("alpha.png", encoded(blob(rng, mode="RGBA"), "PNG"))
    yield kept("grey-alpha.png", encoded(blob(rng, mode="LA"), "PNG"))
    yield kept("alpha.webp", encoded(blob(rng, mode="RGBA"), "WEBP"))
    yield kept("bits.png", encoded(blob(rng, mode="1"), "PNG"))
    yield kept("bits.tif", encoded(blob(rng, mode="1"), "TIFF", compression="group4"))
    yield kept("lossless.webp", encoded(blob(rng), "WEBP", lossless=True))
    for mode in ("RGB", "L", "1", "P", "RGBA"):
        yield Bad("1x1", f"dot-{mode}.png", encoded(blob(rng, (1, 1)).convert(mode), "PNG"), "kept")
    yield Bad("1x1", "dot.jpg", encoded(blob(rng, (1, 1)), "JPEG"), "kept")
    yield Bad("1x1", "dot.gif", encoded(blob(rng, (1, 1)), "GIF"), "kept")
    yield Bad("1x1", "line.png", encoded(blob(rng, (1, 4000)), "PNG"), "kept")
    frames = [blob(rng) for _ in range(4)]
    for ext, kind in (("gif", "GIF"), ("png", "PNG"), ("webp", "WEBP"), ("tif", "TIFF")):
        yield Bad("animated", f"film.{ext}", encoded(frames[0], kind, save_all=True, append_images=frames[1:]), "kept", "first of its")


def broken_exif(rng):
    "Turned images whose EXIF is damaged: the image is whole, only its note is not."
    exif = Image.Exif()
    exif[0x0112], exif[0x010F], exif[0x8769] = 6, "maker", {0x9003: "2020:01:01 00:00:00"}
    good = encoded(blob(rng), "JPEG", exif=exif)
    at = good.index(b"Exif\0\0") + 6
    yield Bad("EXIF broken", "sound.jpg", good, "kept")
    yield Bad("EXIF broken", "no-tiff.jpg", good[:at] + b"XXXXXXXX" + good[at + 8:], "kept", "EXIF")
    yield Bad("EXIF broken", "far.jpg", good[:at + 4] + b"\x7f\xff\xff\xff" + good[at + 8:], "kept")
    yield Bad("EXIF broken", "many.jpg", good[:at + 8] + b"\xff\xff" + good[at + 10:], "kept")
    for k in range(12):
        yield Bad("EXIF broken", f"exif{k}.jpg", flipped(good, rng, at, at + 40, 3), "kept")
    exif[0x0112] = 77
    yield Bad("EXIF broken", "turn77.jpg", encoded(blob(rng), "JPEG", exif=exif), "kept")
    yield Bad("EXIF broken", "exif.png", encoded(blob(rng), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + bytes(8)), "kept")
    yield Bad("EXIF broken", "exif.webp", encoded(blob(rng), "WEBP", exif=b"Exif\0\0nonsense"), "kept", "EXIF")


def lies(rng, whole):
    "Names that say something else than the file."
    for ext, data in whole.items():
        wrong = "jpg" if "jpg" not in ext else "png"
        yield Bad("wrong extension", f"really-{ext}.{wrong}", data, "kept")
        yield Bad("wrong extension", f"hidden-{ext}.txt", data, "out", "not an image by its name")
    for ext in ("jpg", "png", "gif", "bmp", "webp", "tif", "ppm"):
        yield Bad("zero bytes", f"empty.{ext}", b"", "out", "is empty")
        yield Bad("nothing but zeros or noise", f"zeros.{ext}", bytes(5000), "out")
        yield Bad("nothing but zeros or noise", f"noise.{ext}", rng.bytes(5000), "out")
    svg = b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>alert(1)</script></svg>'
    html = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head><body><h1>Forbidden</h1></body></html>"
    texts = (svg, "SVG"), (svg[22:], "SVG"), (b"\xef\xbb\xbf" + svg, "SVG"), (html, "web page"), (b"\n " + html.lower(), "web page")
    for k, (data, says) in enumerate(texts):
        yield Bad("SVG and HTML named .jpg", f"text{k}.jpg", data, "out", says)
    yield Bad("SVG and HTML named .jpg", "drawing.svg", svg, "out", "not an image by its name")
    yield Bad("other files named .jpg", "error.jpg", b'{"error": "not found"}', "out")
    yield Bad("other files named .jpg", "pickle.jpg", b"cos\nsystem\n(S'touch EXECUTED'\ntR.", "out")
    yield Bad("other files named .jpg", "script.jpg", b"#!/bin/sh\ntouch EXECUTED\n", "out")
    yield Bad("other files named .jpg", "zip.jpg", b"PK\x03\x04" + rng.bytes(400), "out")
    yield Bad("other files named .jpg", "pdf.jpg", b"%PDF-1.4\n" + rng.bytes(400), "out", "PDF")
    yield Bad("other files named .jpg", "heic.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + rng.bytes(400), "out", "HEIC")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 90\n%%EndComments\n(%pipe%touch EXECUTED) (w) file\nshowpage\n%%EOF\n"
    for name in ("eps.jpg", "eps.png"):
        yield Bad("PostScript named .jpg (runs Ghostscript)", name, eps, "out", "PostScript")


NAMES = [
    "with space.jpg", "two  spaces .jpg", "new\nline.jpg", "tab\there.jpg", "carriage\rreturn.jpg", "bell\a\x1b[31m.jpg", "🌻🐝.jpg",
    "family\U0001f468\u200d\U0001f469.jpg", "quote'\".jpg", "back\\slash.jpg", "-rf.jpg", "*?[a].jpg", "%s{0}$HOME.jpg",
    "comma,semicolon;.jpg", "<b>html&amp;.jpg", "\u202egpj.jpg", "e\u0301.jpg", "\u00e9.jpg", "x" * 251 + ".jpg", "UPPER.JPG",
    "ümläut.JPEG", "trailing..jpg", "name.jpg.png"]
BYTES = [b"latin1-\xe9\xff.jpg", b"\xff\xfe.jpg", b"half-\xf0\x9f.jpg"]


def corpus(rng, times=1):
    whole = wholes(rng)
    yield from (Bad("sound", f"whole.{ext}", data, "kept") for ext, data in whole.items())
    yield from truncated(whole, rng, times)
    yield from flips(whole, rng, times)
    yield from bombs(rng)
    yield from odd_modes(rng)
    yield from broken_exif(rng)
    yield from lies(rng, whole)
    for name in NAMES + [b.decode("utf-8", "surrogateescape") for b in BYTES]:
        yield Bad("odd names", name, encoded(blob(rng), "JPEG"), "kept")
        yield Bad("odd names", "bad " + name if len(name) < 200 else "y" + name[1:], b"no image", "out")


def lay_out(root: Path, classes=("left", "right"), n=16, seed=0):
    "A sound image folder to put the others into."
    rng = np.random.default_rng(seed)
    for c in classes:
        (root / c).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / c / f"good{i:02}.jpg").write_bytes(encoded(blob(rng), "JPEG", quality=92))
    return root
