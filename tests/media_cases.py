"""Files of sound and film for tests, which lose nothing of what they are given."""

import io
import wave

import av
import numpy as np


def wav(path, samples, rate=16_000):
    """A file of 16-bit samples [T] or [T, channels]."""
    whole = np.round(samples * 32767).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(whole.shape[1] if whole.ndim == 2 else 1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(whole.tobytes())
    return str(path)


def film(path, frames):
    """A lossless file of frames."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as file:
        track = file.add_stream("ffv1", rate=5)
        track.height, track.width = frames.shape[1:3]
        track.pix_fmt = "bgr0"
        for frame in frames:
            file.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(track.encode(None))
    path.write_bytes(stream.getvalue())
    return str(path)
