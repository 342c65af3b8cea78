"""Streams on this machine's own loopback, whose pictures say which frame they are."""

import contextlib
import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT = 96, 64
_NUM_BITS, _BIT_PX = 12, 8


def numbered_frame(index: int) -> np.ndarray:
    """Texture, with the frame's number in black and white on top, 8 pixels a bit."""
    frame = np.random.default_rng(7).integers(0, 100, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    frame = cv2.resize(frame, (WIDTH, HEIGHT))
    bits = [255 * (index >> b & 1) for b in range(_NUM_BITS)]
    frame[:16] = np.repeat(np.array(bits, np.uint8), _BIT_PX)[None, :, None]
    return frame


def number_of(frame: np.ndarray) -> int:
    levels = frame[2:14].reshape(12, _NUM_BITS, _BIT_PX, 3)[:, :, 2:-2].mean(axis=(0, 2, 3))
    return int(sum(1 << b for b, level in enumerate(levels) if level > 128))


def write_numbered(path: Path, codec: str, *, num_frames: int, fps: float = 30) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (WIDTH, HEIGHT))
    for index in range(num_frames):
        writer.write(numbered_frame(index))
    writer.release()
    return path


class StreamServer:
    """A server that sends numbered frames at a pace, and then ends or falls silent.

    Attributes:
        url: Where it is.
        num_sent: Frames sent until now.
    """

    def __init__(
        self,
        serve: Callable[["StreamServer", socketserver.StreamRequestHandler], None],
        url: str,
        *,
        num_frames: int,
        fps: float = 60,
        is_silent_after: bool = False,
    ) -> None:
        self._is_closed = threading.Event()
        self._num_frames, self._fps, self._is_silent = num_frames, fps, is_silent_after
        self.num_sent = 0
        server = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):
                    serve(server, self)

        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = url.format(port=self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def paced(self) -> Iterator[int]:
        """Numbers of frames, each when it is due."""
        for index in range(self._num_frames):
            yield index
            self.num_sent = index + 1
            if self._is_closed.wait(1 / self._fps):
                return
        if self._is_silent:
            self._is_closed.wait()

    def __enter__(self) -> "StreamServer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_closed.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def mjpeg_server(
    *, num_frames: int, fps: float = 60, is_silent_after: bool = False
) -> StreamServer:
    """MJPEG over HTTP, as network cameras give it."""

    def serve(server: StreamServer, request: socketserver.StreamRequestHandler) -> None:
        while request.rfile.readline().strip():
            pass
        kind = b"multipart/x-mixed-replace; boundary=frame"
        request.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: " + kind + b"\r\n\r\n")
        for index in server.paced():
            picture = cv2.imencode(".jpg", numbered_frame(index))[1].tobytes()
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
            request.wfile.write(head.encode() + picture + b"\r\n")

    url = "http://127.0.0.1:{port}/video"
    return StreamServer(serve, url, num_frames=num_frames, fps=fps, is_silent_after=is_silent_after)


def file_server(path: Path) -> StreamServer:
    """One file over HTTP, in one answer."""

    def serve(server: StreamServer, request: socketserver.StreamRequestHandler) -> None:
        while request.rfile.readline().strip():
            pass
        content = path.read_bytes()
        request.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content))
        request.wfile.write(content)

    return StreamServer(serve, f"http://127.0.0.1:{{port}}/{path.name}", num_frames=0)


def rtsp_server(folder: Path, *, num_frames: int, fps: float = 60) -> StreamServer:
    """MPEG-4 over RTP over RTSP (RFC 2326, RFC 6416), on the one TCP connection."""
    video = write_numbered(folder / "stream.avi", "mp4v", num_frames=num_frames)
    pictures = _chunks_of_avi(video.read_bytes())
    config = pictures[0][: pictures[0].index(b"\x00\x00\x01\xb6")].hex()
    description = (
        "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=clip\r\nc=IN IP4 127.0.0.1\r\nt=0 0\r\n"
        "m=video 0 RTP/AVP 96\r\na=rtpmap:96 MP4V-ES/90000\r\n"
        f"a=fmtp:96 profile-level-id=1; config={config}\r\na=control:track0\r\n"
    )

    def serve(server: StreamServer, request: socketserver.StreamRequestHandler) -> None:
        while True:
            lines = []
            while line := request.rfile.readline().decode().strip():
                lines.append(line)
            if not lines:
                return
            method = lines[0].split()[0]
            answer = ["RTSP/1.0 200 OK", next(x for x in lines if x.lower().startswith("cseq"))]
            body = description if method == "DESCRIBE" else ""
            if method == "OPTIONS":
                answer.append("Public: OPTIONS, DESCRIBE, SETUP, PLAY, TEARDOWN")
            if method == "DESCRIBE":
                answer += [f"Content-Base: {server.url}/", "Content-Type: application/sdp"]
                answer.append(f"Content-Length: {len(body)}")
            if method in ("SETUP", "PLAY"):
                answer.append("Session: 1")
            if method == "SETUP":
                is_tcp = any("RTP/AVP/TCP" in x for x in lines)
                answer[0] = answer[0] if is_tcp else "RTSP/1.0 461 Unsupported Transport"
                answer.append("Transport: RTP/AVP/TCP;unicast;interleaved=0-1")
            request.wfile.write(("\r\n".join(answer) + "\r\n\r\n" + body).encode())
            if method == "PLAY":
                _send_rtp(server, request.request, pictures, fps)
                return

    return StreamServer(serve, "rtsp://127.0.0.1:{port}/clip", num_frames=num_frames, fps=fps)


def _send_rtp(
    server: StreamServer, connection: socket.socket, pictures: Sequence[bytes], fps: float
) -> None:
    sequence = 0
    for index in server.paced():
        parts = [pictures[index][at : at + 1400] for at in range(0, len(pictures[index]), 1400)]
        for part in parts:
            marker = 0x80 if part is parts[-1] else 0
            time = round(index * 90_000 / fps)
            head = struct.pack(">BBHII", 0x80, marker | 96, sequence & 0xFFFF, time, 1)
            connection.sendall(struct.pack(">cBH", b"$", 0, 12 + len(part)) + head + part)
            sequence += 1


def _chunks_of_avi(content: bytes) -> list[bytes]:
    """The compressed pictures of an AVI with one video."""
    chunks, at = [], content.index(b"movi") + 4
    while content[at : at + 4] == b"00dc":
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        chunks.append(content[at + 8 : at + 8 + size])
        at += 8 + size + size % 2
    return chunks
