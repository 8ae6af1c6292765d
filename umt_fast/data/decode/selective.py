"""H.264 pictures by number without decoding the ones that nothing needs.

Two kinds of pictures can be left out without changing any other by a bit, as the standard defines them: pictures that
are no reference (nal_ref_idc 0; with x264's defaults about half of a file), and what lies between the last wanted
picture and the next IDR picture. Which pictures these are, and the number of each, is read from the packets alone.
Where the packets leave any doubt `plan` returns None, and a sequential decode has to answer.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import av

_SLICE, _PARTITIONS, _IDR, _PARAMETERS = 1, (2, 3, 4), 5, (7, 8, 13, 15)


@dataclass(frozen=True, slots=True)
class Packet:
    """What a packet tells of its picture."""

    pts: int | None
    reference: bool
    idr: bool
    parameters: bool
    """Carries parameter sets, on which later pictures may rely."""


class Irregular(Exception):
    """The stream is not what its packets promised; a sequential decode has to answer."""


def describe(packet: av.Packet, length_size: int) -> Packet | None:
    """Reads the NAL unit headers of a packet; None if it is damaged or of a kind that is not understood."""
    data = memoryview(packet)
    end, at = len(data), 0
    reference = idr = parameters = False
    slices = 0
    while at < end:
        start = at + length_size
        at = start + int.from_bytes(data[at:start], "big")
        if at > end or at == start:
            return None
        header = data[start]
        kind = header & 31
        if kind in (_SLICE, _IDR):
            slices += 1
            idr |= kind == _IDR
            reference |= header & 0x60 != 0
        elif kind in _PARTITIONS:
            return None
        parameters |= kind in _PARAMETERS
    return Packet(packet.pts, reference, idr, parameters) if slices else None


def length_size_of(stream: av.VideoStream) -> int:
    """Bytes of a NAL unit's length field; 0 where the stream is not H.264 in that form (avcC)."""
    extra = stream.codec_context.extradata
    if stream.codec_context.codec.canonical_name != "h264" or not extra or len(extra) < 7 or extra[0] != 1:
        return 0
    return (extra[4] & 3) + 1


def regular(packets: list[Packet], reorder_depth: int) -> bool:
    """Whether picture i is for certain the packet with the i-th smallest time stamp.

    It is when every packet holds one picture with a time stamp of its own, decoding starts at an IDR picture, each group
    of pictures is shown as a whole before the next, and the decoder holds back enough pictures to put them in order.
    """
    if not packets or not packets[0].idr or any(packet.pts is None for packet in packets):
        return False
    if len({packet.pts for packet in packets}) < len(packets):
        return False
    # Parameter sets must come with every IDR picture or never, or leaving out a group would lose some.
    if any(packet.parameters and not packet.idr for packet in packets):
        return False
    if len({packet.parameters for packet in packets if packet.idr}) > 1:
        return False
    shown: list[int] = []
    end = None
    for packet in packets:
        if packet.idr:
            end = shown[-1] if shown else None
            shown = []
        if end is not None and packet.pts < end:
            return False
        bisect.insort(shown, packet.pts)
        if len(shown) - bisect.bisect_right(shown, packet.pts) > reorder_depth:
            return False
    return True


def groups_to_feed(packets: list[Packet], wanted: set[int]) -> list[list[int]]:
    """Packet numbers to decode for the pictures with the wanted time stamps, a list per group from IDR to IDR."""
    groups: list[list[int]] = []
    for number, packet in enumerate(packets):
        if packet.idr:
            groups.append([])
        groups[-1].append(number)
    fed = []
    for group in groups:
        asked = [number for number in group if packets[number].pts in wanted]
        if asked:
            needed = range(group[0], asked[-1] + 1)
            fed.append([n for n in needed if packets[n].reference or packets[n].pts in wanted])
    return fed


def decode(
    context: av.VideoCodecContext, stream: Iterable[av.Packet], packets: list[Packet], groups: list[list[int]]
) -> Iterator[av.VideoFrame]:
    """Decodes the packets of some groups and yields every picture they hold, in order.

    Raises Irregular when they give other pictures than the packets promised.
    """
    depth = context.reorder_depth
    numbered = enumerate(packet for packet in stream if packet.size)
    for group in groups:
        due = sorted(packets[number].pts for number in group)
        feed = set(group)
        given = 0
        for number, packet in numbered:
            if number not in feed:
                continue
            last = number == group[-1]
            frames = list(context.decode(packet))
            # Drained here, a group needs no pictures after its last one to be complete.
            frames += context.decode(None) if last else []
            for frame in frames:
                if given == len(due) or frame.pts != due[given]:
                    raise Irregular
                given += 1
                yield frame
            if last:
                context.flush_buffers()
                # FFmpeg would guess it anew and drop pictures until it has.
                context.reorder_depth = depth
                break
        if given < len(due):
            raise Irregular
