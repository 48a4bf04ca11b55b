package ippacket

import (
	"encoding/binary"
	"errors"
)

// Errors of [Fragment].
var (
	ErrDontFragment = errors.New("the packet is too big and must not be fragmented")
	ErrMTU          = errors.New("the MTU is too small for a fragment")
)

// Fragment calls emit for each fragment of the packet b, in order, that a link
// with an MTU of mtu bytes carries (RFC 791 section 3.2), or once for the packet
// as it is when it fits. p is what [Parse] returned for b, which may itself be a
// fragment. Fragments are built one after the other at the start of scratch, and
// nothing is allocated when its capacity is mtu or more; what emit gets is valid
// until it returns.
//
// When the packet does not fit, the error is ErrDontFragment if it is of IPv6 or
// says so, and ErrMTU if mtu has no room for its header and 8 bytes. Then emit is
// not called.
func Fragment(scratch, b []byte, p Packet, mtu int, emit func(fragment []byte)) error {
	if p.TotalLen <= mtu {
		emit(append(scratch[:0], b[:p.TotalLen]...))
		return nil
	}
	if p.Version != 4 || p.DontFragment {
		return ErrDontFragment
	}
	if mtu < p.HeaderLen+8 {
		return ErrMTU
	}
	header, payload := b[:p.HeaderLen], b[p.HeaderLen:p.TotalLen]
	var later [60]byte // header of all fragments but the first
	for offset := p.FragmentOffset; len(payload) > 0; {
		n, more := len(payload), p.MoreFragments
		if len(header)+n > mtu {
			n, more = (mtu-len(header))&^7, true
		}
		f := append(append(scratch[:0], header...), payload[:n]...)
		setFragment(f, len(header), offset, more)
		emit(f)
		if offset == p.FragmentOffset {
			header = appendLaterHeader(later[:0], header)
		}
		payload = payload[n:]
		offset += n
	}
	return nil
}

// setFragment makes f, which starts with an IPv4 header of headerLen bytes, the
// fragment at offset.
func setFragment(f []byte, headerLen, offset int, more bool) {
	binary.BigEndian.PutUint16(f[2:], uint16(len(f)))
	field := binary.BigEndian.Uint16(f[6:])&^(flagMF|maskOffset) | uint16(offset/8)
	if more {
		field |= flagMF
	}
	binary.BigEndian.PutUint16(f[6:], field)
	f[10], f[11] = 0, 0
	binary.BigEndian.PutUint16(f[10:], checksum(f[:headerLen], 0))
}

// appendLaterHeader appends an IPv4 header with those options of header that are
// copied into fragments other than the first (RFC 791 section 3.1). Options from
// a malformed one on are left out.
func appendLaterHeader(dst, header []byte) []byte {
	const endOfOptions, noOperation, copied = 0, 1, 0x80
	at := len(dst)
	dst = append(dst, header[:ipv4HeaderLen]...)
	for o := header[ipv4HeaderLen:]; len(o) > 0 && o[0] != endOfOptions; {
		if o[0] == noOperation {
			o = o[1:]
			continue
		}
		if len(o) < 2 || o[1] < 2 || int(o[1]) > len(o) {
			break
		}
		if o[0]&copied != 0 {
			dst = append(dst, o[:o[1]]...)
		}
		o = o[o[1]:]
	}
	for (len(dst)-at)%4 != 0 {
		dst = append(dst, endOfOptions)
	}
	dst[at] = 4<<4 | uint8((len(dst)-at)/4)
	return dst
}
