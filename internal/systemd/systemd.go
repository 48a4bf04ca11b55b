// Package systemd connects a service with systemd. A [Service] notifies systemd
// of its state (sd_notify(3)), and [UDPSockets] returns the sockets that
// systemd opened for the service (sd_listen_fds(3)).
//
// In a process that systemd did not start, notifications do nothing and there
// are no sockets, so callers need not distinguish the cases.
package systemd

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// Service notifies systemd of the state of this process. Its methods may be
// called concurrently.
type Service struct {
	logger   *slog.Logger
	watchdog bool      // systemd expects keep-alive notifications
	failed   sync.Once // logs the first failed notification

	mu        sync.Mutex // guards the fields below
	status    string     // text of the last Status
	unhealthy bool       // state of the last Health
}

// NewService returns the Service of this process. It logs the first
// notification that fails.
func NewService(logger *slog.Logger) *Service {
	s := &Service{logger: logger}
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		logger.Warn("no watchdog", "error", err)
	}
	s.watchdog = interval > 0
	return s
}

// IsService reports whether systemd started this process and expects
// notifications.
func IsService() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// Ready notifies systemd that the service has started or reloaded.
func (s *Service) Ready() { s.notify(daemon.SdNotifyReady) }

// Reloading notifies systemd that the service reloads its configuration. The
// caller calls Ready afterwards.
func (s *Service) Reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return // systemd ignores the notification unless it has the time
	}
	s.notify(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
}

// Waiting shows the event that the start of the service waits for, and extends
// TimeoutStartSec=, after which systemd would stop the service. The caller must
// call it again within 30 seconds.
func (s *Service) Waiting(text string) {
	s.Status(text)
	s.notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (30 * time.Second).Microseconds()))
}

// Stopping notifies systemd that the service is about to end.
func (s *Service) Stopping() { s.notify(daemon.SdNotifyStopping) }

// Status makes `systemctl status` show text, in one line.
func (s *Service) Status(text string) {
	text = strings.ReplaceAll(text, "\n", " ")
	s.mu.Lock()
	defer s.mu.Unlock()
	if text != s.status {
		s.status = text
		s.notify("STATUS=" + text)
	}
}

// Alive sends a keep-alive notification if systemd expects them. Without one
// for the time of WatchdogSec=, systemd kills and restarts the service.
func (s *Service) Alive() {
	if s.watchdog {
		s.notify(daemon.SdNotifyWatchdog)
	}
}

// Health is like Alive if err is nil. Otherwise it shows err as the status,
// logs the first of several errors, and sends no keep-alive notification.
func (s *Service) Health(err error) {
	s.mu.Lock()
	before := s.unhealthy
	s.unhealthy = err != nil
	s.mu.Unlock()
	if err == nil {
		s.Alive()
		return
	}
	s.Status(err.Error())
	if !before {
		s.logger.Error("the program is not well; a watchdog will restart it if it stays so",
			"reason", err)
	}
}

// notify sends a notification and logs the first failure.
func (s *Service) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.failed.Do(func() {
			s.logger.Warn("cannot notify systemd of the state of the service", "error", err)
		})
	}
}

// UDPSockets returns the UDP sockets that systemd opened for this process, in
// the order of the socket unit. The caller closes them. The sockets must have
// the given name (FileDescriptorName=). A socket with another name or of
// another type is an error, because nobody would read from it.
func UDPSockets(name string) (sockets []*net.UDPConn, err error) {
	defer func() {
		if err != nil {
			for _, c := range sockets {
				c.Close()
			}
			sockets = nil
		}
	}()
	for _, f := range activation.Files(true) {
		if err == nil && f.Name() != name {
			err = fmt.Errorf("the socket %q has an unknown name: use FileDescriptorName=%s",
				f.Name(), name)
		}
		if err == nil {
			var c *net.UDPConn
			if c, err = udpSocket(f); err == nil {
				sockets = append(sockets, c)
			}
		}
		f.Close() // udpSocket duplicated the descriptor
	}
	return sockets, err
}

// udpSocket returns the UDP socket with the descriptor of f, which it
// duplicates.
func udpSocket(f *os.File) (*net.UDPConn, error) {
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, fmt.Errorf("the socket %q: %w", f.Name(), err)
	}
	udp, ok := c.(*net.UDPConn)
	if !ok {
		err := fmt.Errorf("the socket %q is not a UDP socket: "+
			"use ListenDatagram= with an address and a port", f.Name())
		return nil, errors.Join(err, c.Close())
	}
	return udp, nil
}
