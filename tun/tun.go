// Package tun drives one Linux TUN device: IP packets that the host routes
// into it come out of [Device.Read], packets given to [Device.Write] arrive
// in the host as if received from a network.
//
// There are two devices behind one batched interface. The offload device
// exchanges virtio headers with the kernel, so that one system call moves up
// to 64 KiB of one TCP or UDP flow: Read cuts it into packets, Write
// coalesces packets again. The plain device moves one packet per system call.
// Open chooses at start, see [Config.Offload].
//
// A device is down after Open, without addresses and routes: giving it those
// and bringing it up is for package routing. Close removes the device from
// the host, and all that depends on it goes with it.
package tun

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// Headroom is how many bytes callers leave free in front of each packet
	// given to Write. The virtio header is built there.
	Headroom = 16

	// MaxPacketLen is the length in bytes of the longest IP packet.
	MaxPacketLen = 65535

	// MinMTU and MaxMTU bound the MTU of a device, in bytes. Below 1280 the
	// kernel takes the device's IPv6 addresses away (RFC 8200, section 5).
	MinMTU = 68
	MaxMTU = MaxPacketLen

	// DefaultMTU is the MTU in bytes of a device opened without one: what
	// every IPv6 link carries.
	DefaultMTU = 1280

	// DefaultName is the name of a device opened without one.
	DefaultName = "masque%d"
)

// Config says which device Open makes.
type Config struct {
	// Name of the device, at most 15 characters. One %d in it stands for the
	// lowest number that is free. Empty: DefaultName.
	Name string

	// MTU in bytes, from MinMTU to MaxMTU. 0: DefaultMTU.
	MTU int

	// Offload asks for the offload device. Where the kernel does not have
	// what it needs, Open falls back to the plain one and logs why.
	Offload bool

	// Logger takes the one line about such a fallback. nil: nothing is
	// logged.
	Logger *slog.Logger
}

// withDefaults checks cfg and fills in what was left out.
func (cfg Config) withDefaults() (Config, error) {
	if cfg.Name == "" {
		cfg.Name = DefaultName
	}
	if cfg.MTU == 0 {
		cfg.MTU = DefaultMTU
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := CheckName(cfg.Name); err != nil {
		return cfg, err
	}
	return cfg, CheckMTU(cfg.MTU)
}

// backend is what the two devices differ in. read and write follow
// [Device.Read] and [Device.Write], except that read returns errPacket for a
// packet it had to drop, with n packets that are good all the same.
type backend interface {
	read(bufs [][]byte, sizes []int, offset int) (n int, err error)
	write(bufs [][]byte, offset int) (n int, err error)
	close() error
}

// Device is a TUN device. Its methods may be called concurrently.
//
// The device is known to the kernel by its index: it may be renamed while it
// is in use.
type Device struct {
	backend   backend
	offload   bool
	batchSize int
	index     int

	dropped atomic.Uint64
	closed  atomic.Bool

	mu   sync.Mutex      // guards what follows
	nl   *netlink.Handle // in the network namespace of Open; nil once closed
	name string          // as last seen
	mtu  int             // as last seen
	full uint64          // packets that did not fit the queue in front of Read, as last seen
}

// Open makes a new device in the network namespace of the calling thread. It
// never takes over a device that exists.
//
// The error is ErrInvalid when cfg makes no sense, ErrNameTaken when a device
// of any kind has the name, ErrPermission when CAP_NET_ADMIN is missing, and
// ErrUnsupported when the host has no /dev/net/tun, all to be tested with
// errors.Is; the text says what to do.
func Open(cfg Config) (*Device, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	nl, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("tun: open %s: netlink socket: %w", cfg.Name, err)
	}
	d, err := open(cfg, nl)
	if err != nil {
		nl.Close()
		return nil, err
	}
	return d, nil
}

func open(cfg Config, nl *netlink.Handle) (*Device, error) {
	d := &Device{nl: nl, mtu: cfg.MTU}
	queueLen := plainQueueLen
	if cfg.Offload {
		dev, name, err := openOffload(cfg.Name)
		switch {
		case err == nil:
			d.backend, d.name, d.offload, d.batchSize = dev, name, true, dev.batchSize()
			queueLen = offloadQueueLen
		case errors.Is(err, errNoOffload):
			cfg.Logger.Warn("tun: using the plain device, which is slower", "interface", cfg.Name, "reason", err)
		default:
			return nil, openError(cfg.Name, err)
		}
	}
	if d.backend == nil {
		dev, name, err := openPlain(cfg.Name)
		if err != nil {
			return nil, openError(cfg.Name, err)
		}
		d.backend, d.name, d.batchSize = dev, name, 1
	}
	if err := d.configure(queueLen); err != nil {
		d.backend.close()
		return nil, fmt.Errorf("tun: open %s: %w", d.name, err)
	}
	return d, nil
}

// configure finds the index of a new device and sets what is not set at
// creation.
func (d *Device) configure(queueLen int) error {
	link, err := d.nl.LinkByName(d.name)
	if err != nil {
		return fmt.Errorf("find the new device: %w", err)
	}
	d.index = link.Attrs().Index
	if err := d.nl.LinkSetTxQLen(link, queueLen); err != nil {
		return fmt.Errorf("set queue length %d: %w", queueLen, err)
	}
	if err := d.nl.LinkSetMTU(link, d.mtu); err != nil {
		return fmt.Errorf("set MTU %d: %w", d.mtu, err)
	}
	return nil
}

// refresh brings name and mtu up to date with the kernel. What cannot be
// learned, because the device is closed or was removed, stays as last seen.
// d.mu is held.
func (d *Device) refresh() {
	if d.nl == nil {
		return
	}
	if link, err := d.nl.LinkByIndex(d.index); err == nil {
		d.name, d.mtu = link.Attrs().Name, link.Attrs().MTU
		if stats := link.Attrs().Statistics; stats != nil {
			d.full = max(d.full, stats.TxDropped)
		}
	}
}

// removed reports whether the open device does not exist any more.
func (d *Device) removed() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nl == nil {
		return false
	}
	_, err := d.nl.LinkByIndex(d.index)
	_, notFound := errors.AsType[netlink.LinkNotFoundError](err)
	return notFound
}

// Name returns the name of the device. It asks the kernel, because others may
// rename it, and so it is not for the packet path. On a closed device it is
// the last name seen.
func (d *Device) Name() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	return d.name
}

// Index returns the interface index, which the device keeps for life.
func (d *Device) Index() int { return d.index }

// MTU returns the MTU in bytes. Like Name it asks the kernel.
func (d *Device) MTU() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	return d.mtu
}

// Overflows returns how many packets of the host the kernel dropped so far
// because they did not fit the queue in front of Read. What the kernel hands
// over in one piece counts once. Like Name it asks the kernel.
func (d *Device) Overflows() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.refresh()
	return d.full
}

// SetMTU changes the MTU, in bytes from MinMTU to MaxMTU, also while packets
// flow. The error is ErrInvalid when it is out of range, and os.ErrClosed
// after Close.
func (d *Device) SetMTU(mtu int) error {
	if err := CheckMTU(mtu); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nl == nil {
		return os.ErrClosed
	}
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Index: d.index}}
	if err := d.nl.LinkSetMTU(link, mtu); err != nil {
		if errors.Is(err, syscall.ENODEV) {
			err = ErrRemoved
		}
		return fmt.Errorf("tun: set MTU %d on %s: %w", mtu, d.name, err)
	}
	d.mtu = mtu
	return nil
}

// Offload reports whether this is the offload device.
func (d *Device) Offload() bool { return d.offload }

// BatchSize returns how many packets one Read may return: the number of
// buffers to give it. Write takes any number.
func (d *Device) BatchSize() int { return d.batchSize }

// Dropped returns how many packets Read dropped so far, because they were
// malformed or did not fit the buffers. What the kernel hands over in one
// piece counts once.
func (d *Device) Dropped() uint64 { return d.dropped.Load() }

// Read waits for packets from the host and returns their number n, at least
// 1: packet i is bufs[i][offset:offset+sizes[i]]. There are at least as many
// sizes as bufs. The buffers are the caller's and not retained; contents past
// the packets, but not before offset, may be overwritten.
//
// A packet fits a buffer when it has MTU bytes after offset; but others may
// raise the MTU, and what was queued before the MTU shrank is still longer. What does not fit, either a buffer or in its
// number of packets the batch, is dropped and counted, see Dropped. With
// fewer buffers than BatchSize this can happen to ordinary TCP traffic.
//
// Every error is final: os.ErrClosed after Close, promptly also when Read was
// waiting, and ErrRemoved when someone else deleted the device.
func (d *Device) Read(bufs [][]byte, sizes []int, offset int) (int, error) {
	if len(bufs) == 0 || len(sizes) < len(bufs) {
		return 0, fmt.Errorf("tun: read: %d buffers, %d sizes: %w", len(bufs), len(sizes), ErrInvalid)
	}
	for _, b := range bufs {
		if offset < 0 || offset >= len(b) {
			return 0, fmt.Errorf("tun: read: offset %d in a buffer of %d bytes: %w", offset, len(b), ErrInvalid)
		}
	}
	for {
		n, err := d.backend.read(bufs, sizes, offset)
		if err != nil {
			if err != errPacket {
				return 0, d.readError(err)
			}
			d.dropped.Add(1)
		}
		if n > 0 {
			return n, nil
		}
	}
}

// Write gives packets to the host: packet i is bufs[i][offset:], and offset
// is at least Headroom. Every packet is tried, one that is refused does not
// affect the others. It returns how many were taken, and the first error when
// that is not all: syscall.EIO while the device is down, syscall.EINVAL for
// what is not an IP packet, ErrInvalid for an empty or overlong one. Only
// os.ErrClosed and ErrRemoved are final.
//
// During the call the buffers belong to Write: from offset-Headroom on, up to
// the capacity of each and not only its length, contents may be overwritten,
// because packets of one flow are coalesced by appending to the first. So no
// two buffers may share memory there: cut those that lie behind one another
// in one array with a full slice expression, b[:n:n], which also excludes
// them from being appended to. Buffers with a capacity of offset+MaxPacketLen
// coalesce best. When Write returns the buffers are the caller's again, with
// undefined contents; bufs itself is unchanged. Nothing is retained.
func (d *Device) Write(bufs [][]byte, offset int) (int, error) {
	if offset < Headroom {
		return 0, fmt.Errorf("tun: write: offset %d is less than Headroom, %d: %w", offset, Headroom, ErrInvalid)
	}
	n, err := d.backend.write(bufs, offset)
	if err != nil {
		err = d.writeError(err)
	}
	return n, err
}

// Close removes the device from the host and ends a waiting Read. It may be
// called more than once.
func (d *Device) Close() error {
	d.closed.Store(true)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.nl == nil {
		return nil
	}
	d.refresh()
	d.nl.Close()
	d.nl = nil
	if err := d.backend.close(); err != nil {
		return fmt.Errorf("tun: close %s: %w", d.name, err)
	}
	return nil
}
