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

// Fragment splits the packet b into fragments for a link with an MTU of mtu
// bytes (RFC 791 section 3.2) and calls emit for each of them in order. If the
// packet fits, it calls emit once with the unchanged packet. p is the result of
// [Parse] for b, which may itself be a fragment.
//
// Fragment builds each fragment at the start of scratch, so emit must not
// retain its argument. It allocates nothing if scratch has a capacity of at
// least mtu bytes.
//
// If the packet does not fit, the error is ErrDontFragment for IPv6 and for
// packets with the DF flag, and ErrMTU if mtu is too small for the header and 8
// bytes. Then emit is not called.
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
	var later [60]byte // header of all fragments after the first
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

// setFragment sets the length, fragment offset, flags and checksum in the IPv4
// header of f, which has headerLen bytes. offset is in bytes.
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

// appendLaterHeader appends a copy of an IPv4 header with only the options that
// are copied into fragments after the first (RFC 791 section 3.1). It omits
// malformed options and all options after them.
func appendLaterHeader(dst, header []byte) []byte {
	const endOfOptions, noOperation, copied = 0, 1, 0x80
	start := len(dst)
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
	for (len(dst)-start)%4 != 0 {
		dst = append(dst, endOfOptions)
	}
	dst[start] = 4<<4 | uint8((len(dst)-start)/4)
	return dst
}
