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
	// of Read. A program sends a burst of datagrams faster than they can be
	// read one by one, so the queue has to hold a burst: with 128, a third of
	// 200 datagrams was lost. An entry can have 64 KiB, and the driver never
	// pushes back on who fills it, so the queue must not be where bulk
	// transfers wait: the reader must never wait for a tunnel, and leave the
	// waiting to a queue that is bounded by time (package flowqueue). Beside
	// eight CUBIC flows through such a reader, pings take 10 ms with a queue
	// of 128 as with one of 500 or 1000. Through a reader that is itself held
	// to 200 Mbit/s they take 45 ms with 128 and 300 ms with 500.
	offloadQueueLen = 512

	// maxCoalesce is how many packets are given to the coalescing at once.
	// Linux before 6.9 refuses a UDP packet of more than 64 segments, and 64
	// packets of common size are more than fit one coalesced packet.
	maxCoalesce = 64
)

// offload is the device of wireguard-go, in the form that starts no
// goroutines.
type offload struct {
	dev wgtun.Device

	mu    sync.Mutex // guards batch
	batch [][]byte
}

// openOffload makes a device with virtio headers and segmentation offloads,
// and returns its name. The error is errNoOffload where the kernel has none
// of that. EBUSY, EPERM and so on are left for openError.
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
	// From here the descriptor belongs to an os.File: when this fails, which
	// takes a system call that just succeeded to fail, its finalizer closes
	// it, and a second close could hit someone else's descriptor.
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
	if err := unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, unix.TUN_F_CSUM|unix.TUN_F_TSO4|unix.TUN_F_TSO6); err != nil {
		return "", fmt.Errorf("%w: TUNSETOFFLOAD: %w", errNoOffload, err)
	}
	return name, nil
}

func (o *offload) batchSize() int { return o.dev.BatchSize() }

func (o *offload) close() error { return o.dev.Close() }

// read tells apart what is wrong with one packet and what is wrong with the
// device. wireguard-go indexes buffers by what the packet's headers say: a
// segment that is longer than a buffer makes it panic, or, where there is
// capacity after the buffer, return a cut segment with its full length.
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

// isFileError reports whether err is about the device, because it comes from
// the descriptor, rather than about a packet that was read from it. EINVAL is
// how the driver says that it had to drop a packet whose segmentation it
// cannot describe.
func isFileError(err error) bool {
	_, ok := errors.AsType[*fs.PathError](err)
	return ok && !errors.Is(err, unix.EINVAL) || errors.Is(err, os.ErrClosed) || errors.Is(err, io.EOF)
}

// write hands copies of the slice headers to wireguard-go, which moves and
// extends them. It also fails a whole batch for one empty packet, and lets a
// coalesced packet grow as long as there is capacity, even beyond what an IP
// header can say; neither gets to see such a buffer.
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

// writeBatch writes o.batch and forgets it. wireguard-go counts bytes and
// joins the errors of the writes that failed. Where some writes of a batch
// fail and others do not, a coalesced packet counts as one packet lost.
func (o *offload) writeBatch(offset int) (int, error) {
	defer clear(o.batch)
	bytes, err := o.dev.Write(o.batch, offset)
	switch {
	case err == nil:
		return len(o.batch), nil
	case bytes == 0:
		_, first := leaves(err)
		return 0, first
	default:
		failed, first := leaves(err)
		return max(0, len(o.batch)-failed), first
	}
}

// leaves returns the number of errors joined in err, and the first.
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

func firstError(a, b error) error {
	if a != nil {
		return a
	}
	return b
}

// validLen reports whether b has a packet after offset that is not empty and
// not longer than an IP packet can be.
func validLen(b []byte, offset int) bool {
	return len(b) > offset && len(b)-offset <= MaxPacketLen
}
