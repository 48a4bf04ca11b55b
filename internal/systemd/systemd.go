// Package systemd is what a program and systemd tell each other: the state of a
// service (sd_notify(3)), and sockets that systemd opened for it
// (sd_listen_fds(3)). For a process that systemd did not start, all of it does
// nothing.
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

// A Service tells systemd how this process is. Its methods may be called
// concurrently.
type Service struct {
	logger   *slog.Logger
	watchdog bool
	failed   sync.Once

	mu     sync.Mutex
	status string // told last
	ill    bool   // as told last by Health
}

// NewService makes the Service of this process. That systemd cannot be told is
// logged, once.
func NewService(logger *slog.Logger) *Service {
	s := &Service{logger: logger}
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		logger.Warn("no watchdog", "error", err)
	}
	s.watchdog = interval > 0
	return s
}

// IsService reports whether systemd started this process and waits to be told how it is.
func IsService() bool { return os.Getenv("NOTIFY_SOCKET") != "" }

// Ready tells that the service has started, or has reloaded.
func (s *Service) Ready() { s.notify(daemon.SdNotifyReady) }

// Reloading tells that the service reads its configuration again; Ready follows.
func (s *Service) Reloading() {
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return // without the time, systemd takes no notice
	}
	s.notify(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
}

// Waiting tells what the start of the service waits for, and that it goes on: systemd would otherwise end it after the time
// of TimeoutStartSec=. It has to be told again within half a minute.
func (s *Service) Waiting(text string) {
	s.Status(text)
	s.notify(fmt.Sprintf("EXTEND_TIMEOUT_USEC=%d", (30 * time.Second).Microseconds()))
}

// Stopping tells that the service is about to end.
func (s *Service) Stopping() { s.notify(daemon.SdNotifyStopping) }

// Status has `systemctl status` show a text of one line.
func (s *Service) Status(text string) {
	text = strings.ReplaceAll(text, "\n", " ")
	s.mu.Lock()
	defer s.mu.Unlock()
	if text != s.status {
		s.status = text
		s.notify("STATUS=" + text)
	}
}

// Alive feeds the watchdog, if there is one. A service that does not do so for
// the time of WatchdogSec= is killed and started again.
func (s *Service) Alive() {
	if s.watchdog {
		s.notify(daemon.SdNotifyWatchdog)
	}
}

// Health is Alive when illness is nil. Otherwise it shows and logs what is
// wrong, and does not feed the watchdog.
func (s *Service) Health(illness error) {
	s.mu.Lock()
	before := s.ill
	s.ill = illness != nil
	s.mu.Unlock()
	if illness == nil {
		s.Alive()
		return
	}
	s.Status(illness.Error())
	if !before {
		s.logger.Error("the program is not well; a watchdog will restart it if it stays so", "reason", illness)
	}
}

func (s *Service) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		s.failed.Do(func() { s.logger.Warn("systemd cannot be told how the service is", "error", err) })
	}
}

// UDPSockets returns the UDP sockets that systemd opened for this
// process, in its order, under the given name (FileDescriptorName=); none when
// there are none. The caller closes them. Sockets of other names or types are
// an error: something is listening, and nobody would answer.
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
			err = fmt.Errorf("the socket %q is not known: want FileDescriptorName=%s", f.Name(), name)
		}
		if err == nil {
			var c *net.UDPConn
			if c, err = udpSocket(f); err == nil {
				sockets = append(sockets, c)
			}
		}
		f.Close() // net has a copy
	}
	return sockets, err
}

func udpSocket(f *os.File) (*net.UDPConn, error) {
	c, err := net.FilePacketConn(f)
	if err != nil {
		return nil, fmt.Errorf("the socket %q: %w", f.Name(), err)
	}
	udp, ok := c.(*net.UDPConn)
	if !ok {
		return nil, errors.Join(fmt.Errorf("the socket %q is not of UDP: want ListenDatagram= with an address and a port", f.Name()), c.Close())
	}
	return udp, nil
}
