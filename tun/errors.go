package tun

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

var (
	// ErrInvalid means that an argument or a configuration value is invalid.
	ErrInvalid = errors.New("invalid argument")

	// ErrNameTaken means that a network device of any kind has the name.
	ErrNameTaken = errors.New("name is taken")

	// ErrPermission means that the program may not create network devices.
	ErrPermission = errors.New("permission denied")

	// ErrUnsupported means that the host has no TUN driver.
	ErrUnsupported = errors.New("the host has no TUN devices")

	// ErrRemoved means that another program deleted the open device.
	ErrRemoved = errors.New("device was removed by another program")

	// errPacket means that backend.read dropped a packet.
	errPacket = errors.New("packet dropped")

	// errNoOffload means that the kernel does not support the offload device.
	errNoOffload = errors.New("no offload")

	// errPacketLen means that a packet given to Write is empty or longer than
	// MaxPacketLen.
	errPacketLen = fmt.Errorf("empty or overlong packet: %w", ErrInvalid)
)

// CheckName returns nil if name is valid for [Config.Name], and otherwise an
// error that matches ErrInvalid and states the reason.
func CheckName(name string) error {
	var reason string
	before, after, pattern := strings.Cut(name, "%")
	switch {
	case name == "":
		reason = "is empty"
	case len(name) >= unix.IFNAMSIZ:
		reason = fmt.Sprintf("is longer than %d bytes", unix.IFNAMSIZ-1)
	case name == "." || name == ".." || name == "all" || name == "default":
		reason = "is reserved"
	case strings.ContainsFunc(before+after, func(r rune) bool {
		return r <= ' ' || r > '~' || r == '/' || r == ':'
	}):
		reason = "has a character other than printable ASCII without blank, slash and colon"
	case pattern && (!strings.HasPrefix(after, "d") || strings.Contains(after, "%")):
		reason = "has a % that is not one %d"
	default:
		return nil
	}
	return fmt.Errorf("tun: device name %q %s: %w", name, reason, ErrInvalid)
}

// CheckMTU returns nil if mtu is from MinMTU to MaxMTU, and otherwise an error
// that matches ErrInvalid.
func CheckMTU(mtu int) error {
	if mtu < MinMTU || mtu > MaxMTU {
		return fmt.Errorf("tun: MTU %d is not from %d to %d: %w", mtu, MinMTU, MaxMTU, ErrInvalid)
	}
	return nil
}

// openError turns the kernel's error about creating the device into an error
// for users, with a cause and a remedy.
func openError(name string, err error) error {
	var remedy string
	switch {
	case errors.Is(err, unix.EBUSY):
		err = ErrNameTaken
		remedy = fmt.Sprintf("choose another name, or look at the device with "+
			"`ip -d link show %s` and delete it", name)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		err = fmt.Errorf("%w: %w", ErrPermission, err)
		remedy = "run as root or with CAP_NET_ADMIN, and with access to " + nodePath
	case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		err = fmt.Errorf("%w: %w", ErrUnsupported, err)
		remedy = "load the driver with `modprobe tun`; a container must be given " + nodePath
	default:
		return fmt.Errorf("tun: open %s: %w", name, err)
	}
	return fmt.Errorf("tun: open %s: %w: %s", name, err, remedy)
}

// readError turns an error of the backend into one that Read documents. When
// another program deletes the device, the runtime's poller may report only "not
// pollable", so readError asks the kernel whether the device exists.
func (d *Device) readError(err error) error {
	if d.removed() {
		err = ErrRemoved
	}
	return d.ioError("read from", err)
}

// writeError turns an error of the backend into one that Write documents.
func (d *Device) writeError(err error) error {
	if errors.Is(err, syscall.EIO) {
		err = fmt.Errorf("device is down: %w", err)
	}
	return d.ioError("write to", err)
}

// ioError returns the error for an operation, such as "read from", that failed.
func (d *Device) ioError(operation string, err error) error {
	if d.closed.Load() {
		return os.ErrClosed
	}
	if errors.Is(err, os.ErrClosed) || errors.Is(err, syscall.EBADFD) {
		err = ErrRemoved
	}
	return fmt.Errorf("tun: %s device %d: %w", operation, d.index, err)
}
