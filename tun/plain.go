package tun

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"syscall"

	"github.com/songgao/water"
	"golang.org/x/sys/unix"
)

// plainQueueLen is the length in packets of the kernel's queue in front of
// Read. It is the kernel's default, because no entry is longer than the MTU.
const plainQueueLen = 500

// plain is the device of songgao/water. It moves one packet per system call,
// and the kernel does the segmentation.
type plain struct {
	file *os.File

	mu sync.Mutex // guards buf

	// buf is longer than any packet, so that read notices packets that do not
	// fit the caller's buffer.
	buf []byte
}

// openPlain creates a device without offloads and returns its name. Errors are
// the kernel's, for openError.
func openPlain(name string) (*plain, string, error) {
	if err := checkCreate(name); err != nil {
		return nil, "", err
	}
	// water does not set close-on-exec. The lock prevents other goroutines from
	// starting a program that would inherit the device.
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	dev, err := water.New(water.Config{
		DeviceType:             water.TUN,
		PlatformSpecificParams: water.PlatformSpecificParams{Name: name},
	})
	if err != nil {
		return nil, "", err
	}
	// water opens the node in non-blocking mode and calls os.NewFile after
	// TUNSETIFF, so the runtime polls the descriptor and Close ends a Read.
	file, ok := dev.ReadWriteCloser.(*os.File)
	if !ok {
		dev.Close()
		return nil, "", fmt.Errorf("water returned a %T instead of a file", dev.ReadWriteCloser)
	}
	conn, err := file.SyscallConn()
	if err == nil {
		err = conn.Control(func(fd uintptr) { unix.CloseOnExec(int(fd)) })
	}
	if err != nil {
		file.Close()
		return nil, "", fmt.Errorf("set close-on-exec: %w", err)
	}
	return &plain{file: file, buf: make([]byte, MaxPacketLen+1)}, dev.Name(), nil
}

// checkCreate asks the kernel whether it would create a device with this name.
// It passes flags without a device type, which the kernel refuses with EINVAL
// after it has checked the name and the permission.
//
// The check is needed because water would attach to a persistent TUN device
// with this name, which Close would then remove, and because water leaks its
// descriptor if it fails.
func checkCreate(name string) error {
	fd, err := openNode()
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = createDevice(fd, name, 0)
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}

func (p *plain) close() error { return p.file.Close() }

func (p *plain) read(bufs [][]byte, sizes []int, offset int) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	n, err := p.file.Read(p.buf)
	if err != nil {
		return 0, err
	}
	if n > len(bufs[0])-offset {
		return 0, errPacket
	}
	sizes[0] = copy(bufs[0][offset:], p.buf[:n])
	return 1, nil
}

func (p *plain) write(bufs [][]byte, offset int) (n int, err error) {
	for _, b := range bufs {
		if !validLen(b, offset) {
			err = firstError(err, errPacketLen)
			continue
		}
		if _, werr := p.file.Write(b[offset:]); werr != nil {
			err = firstError(err, werr)
			continue
		}
		n++
	}
	return n, err
}
