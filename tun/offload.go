package tun

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	wgtun "golang.zx2c4.com/wireguard/tun"
)

const (
	// offloadQueueLen is the length in packets of the kernel's queue in front
	// of Read. Programs send datagrams in bursts, faster than Read can take
	// them, so the queue must hold a burst: with 128 entries, a third of 200
	// datagrams was lost.
	//
	// An entry can have 64 KiB, and the driver exerts no back pressure on
	// senders. So bulk transfers must not wait in this queue: the reader must
	// never wait for the tunnel, and instead use a queue that is bounded by
	// time (package flowqueue). With such a reader, pings beside eight CUBIC
	// flows take 10 ms whether the queue has 128, 500 or 1000 entries. With a
	// reader limited to 200 Mbit/s they take 45 ms with 128 entries and 300 ms
	// with 500.
	offloadQueueLen = 512

	// maxCoalesce is the most packets that wireguard-go gets to coalesce at
	// once. Linux before 6.9 refuses a UDP packet of more than 64 segments, and
	// 64 packets of common size already exceed one coalesced packet.
	maxCoalesce = 64
)

// offload is wireguard-go's device in its unmonitored form, which starts no
// goroutines.
type offload struct {
	dev wgtun.Device

	mu    sync.Mutex // guards batch
	batch [][]byte   // scratch space of write
}

// openOffload creates a device with virtio headers and segmentation offloads
// and returns its name. The error matches errNoOffload if the kernel supports
// neither. Other errors are the kernel's, for openError.
func openOffload(name string) (*offload, string, error) {
	fd, err := openNode()
	if err != nil {
		return nil, "", err
	}
	name, err = createOffload(fd, name)
	if err != nil {
		unix.Close(fd)
		return nil, "", err
	}
	// CreateUnmonitoredTUNFromFD gives fd to an os.File. If it then fails,
	// which is unlikely because the same system calls just succeeded, the
	// finalizer of the file closes fd. Closing it here too could close an
	// unrelated descriptor.
	dev, _, err := wgtun.CreateUnmonitoredTUNFromFD(fd)
	if err != nil {
		return nil, "", err
	}
	return newOffload(dev), name, nil
}

func newOffload(dev wgtun.Device) *offload {
	return &offload{dev: dev, batch: make([][]byte, 0, maxCoalesce)}
}

func createOffload(fd int, name string) (string, error) {
	features, err := unix.IoctlGetUint32(fd, unix.TUNGETFEATURES)
	if err != nil {
		return "", fmt.Errorf("%w: TUNGETFEATURES: %w", errNoOffload, err)
	}
	if features&unix.IFF_VNET_HDR == 0 {
		return "", fmt.Errorf("%w: the driver has no IFF_VNET_HDR", errNoOffload)
	}
	name, err = createDevice(fd, name, unix.IFF_TUN|unix.IFF_NO_PI|unix.IFF_VNET_HDR)
	if err != nil {
		return "", err
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD,
		unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
		return "", fmt.Errorf("%w: TUNSETOFFLOAD: %w", errNoOffload, err)
	}
	return name, nil
}

func (o *offload) batchSize() int { return o.dev.BatchSize() }

func (o *offload) close() error { return o.dev.Close() }

// read distinguishes errors about a packet from errors of the device.
// wireguard-go indexes buffers by lengths from the packet's headers. If a
// segment is longer than its buffer, wireguard-go panics, or, if the buffer has
// more capacity, returns a truncated segment with its full length.
func (o *offload) read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	defer func() {
		if recover() != nil {
			n, err = 0, errPacket
		}
	}()
	n, err = o.dev.Read(bufs, sizes, offset)
	if err != nil && !isFileError(err) {
		err = errPacket
	}
	for i := range n {
		if sizes[i] > len(bufs[i])-offset {
			return 0, errPacket
		}
	}
	return n, err
}

// isFileError reports whether err comes from the file descriptor and not from
// parsing a packet. EINVAL does not count: the driver returns it after it
// dropped a packet whose segmentation it cannot describe.
func isFileError(err error) bool {
	_, ok := errors.AsType[*fs.PathError](err)
	return ok && !errors.Is(err, unix.EINVAL) || errors.Is(err, os.ErrClosed) ||
		errors.Is(err, io.EOF)
}

// write gives copies of the slice headers to wireguard-go, which reorders and
// extends them. wireguard-go would fail a batch because of one empty packet,
// so write leaves invalid packets out. It would also coalesce beyond the length
// that an IP header can hold, so write limits the capacity of buffers.
func (o *offload) write(bufs [][]byte, offset int) (n int, err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(bufs) > 0 {
		chunk := bufs[:min(len(bufs), maxCoalesce)]
		bufs = bufs[len(chunk):]
		o.batch = o.batch[:0]
		for _, b := range chunk {
			if !validLen(b, offset) {
				err = firstError(err, errPacketLen)
				continue
			}
			o.batch = append(o.batch, b[:len(b):min(cap(b), offset+MaxPacketLen)])
		}
		written, werr := o.writeBatch(offset)
		n += written
		err = firstError(err, werr)
	}
	return n, err
}

// writeBatch writes o.batch, clears it and returns the number of packets
// written. wireguard-go returns the number of bytes and joins the errors of
// failed writes. If only some writes of a batch fail, a lost coalesced packet
// counts as one packet.
func (o *offload) writeBatch(offset int) (int, error) {
	defer clear(o.batch)
	length, err := o.dev.Write(o.batch, offset)
	switch {
	case err == nil:
		return len(o.batch), nil
	case length == 0:
		_, first := leaves(err)
		return 0, first
	default:
		failed, first := leaves(err)
		return max(0, len(o.batch)-failed), first
	}
}

// leaves returns the number of errors joined in err, at any depth, and the
// first of them.
func leaves(err error) (n int, first error) {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return 1, err
	}
	for _, e := range joined.Unwrap() {
		m, f := leaves(e)
		n += m
		first = firstError(first, f)
	}
	return n, first
}

// firstError returns a, or b if a is nil.
func firstError(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// validLen reports whether the packet after offset in b is neither empty nor
// longer than MaxPacketLen.
func validLen(b []byte, offset int) bool {
	return len(b) > offset && len(b)-offset <= MaxPacketLen
}
