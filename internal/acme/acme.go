// Package acme keeps the certificate of one name good, by ACME (RFC 8555): it
// gets it when there is none, renews it in time, and keeps it, its key and the
// account in a folder. It is all of ours that knows certmagic.
package acme

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/caddyserver/certmagic"
	"github.com/cenkalti/backoff/v5"
	"github.com/mholt/acmez/v3/acme"
)

// LetsEncrypt is the directory of Let's Encrypt.
const LetsEncrypt = certmagic.LetsEncryptProductionCA

// A Challenge is how the server sees that the name is this host's.
type Challenge string

// The challenges. The server asks on a TCP port of its choice, which is the
// standard one.
const (
	TLSALPN Challenge = "tls-alpn-01" // RFC 8737, port 443
	HTTP    Challenge = "http-01"     // RFC 8555 section 8.3, port 80
)

// Port is the TCP port that the server asks on.
func (c Challenge) Port() int {
	if c == HTTP {
		return certmagic.HTTPChallengePort
	}
	return certmagic.TLSALPNChallengePort
}

// Listen is where a challenge is answered unless something else is said.
func (c Challenge) Listen() string { return ":" + strconv.Itoa(c.Port()) }

// Config says which certificate to get, and how. All fields but Roots are
// needed.
type Config struct {
	Name      string         // that the certificate is for, a domain name or an address
	Directory string         // URL of the server's directory
	Email     string         // of the account: where the server writes about problems
	Roots     *x509.CertPool // that the server itself is verified with; nil: the system's
	Challenge Challenge
	Listen    string // TCP address and port where the challenge is answered, only while it is asked
	Storage   string // folder, made when it is missing; all in it is readable for its owner alone
	Logger    *slog.Logger
}

// How long until a failed attempt is made again: below the rates at which
// servers refuse (Let's Encrypt: five failures of a name in an hour).
const (
	firstRetry = time.Minute
	retryGrows = 3
	lastRetry  = time.Hour
)

// lookInterval is how often at least the stored certificate, and when the
// server wants it renewed, are looked at.
const lookInterval = 6 * time.Hour

// Status tells how a Manager is.
type Status struct {
	// *Error of the last attempt to get or renew the certificate; nil: none is
	// due, or it goes on
	Problem error
	Next    time.Time // when it is tried again after Problem
}

// Manager keeps one certificate good while Run runs. Its methods may be called
// concurrently.
type Manager struct {
	cfg         Config
	certificate atomic.Pointer[tls.Certificate]
	ready       chan struct{}
	again       chan struct{}

	mu     sync.Mutex
	status Status
}

// New makes a Manager, which begins with Run.
func New(cfg Config) *Manager {
	return &Manager{cfg: cfg, ready: make(chan struct{}), again: make(chan struct{}, 1)}
}

// Ready is closed when there is a certificate.
func (m *Manager) Ready() <-chan struct{} { return m.ready }

// Certificate returns the certificate to use, with its Leaf; nil before Ready.
// It is not to be changed.
func (m *Manager) Certificate() *tls.Certificate { return m.certificate.Load() }

// Status returns what has been in the way since the last success.
func (m *Manager) Status() Status {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.status
}

func (m *Manager) setStatus(s Status) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.status = s
}

// Again ends the wait after a failure: what was in the way may be gone.
func (m *Manager) Again() {
	if m.Status().Problem == nil {
		return
	}
	select {
	case m.again <- struct{}{}:
	default:
	}
}

// Run keeps the certificate good until ctx ends. What goes wrong is logged,
// with a remedy, and tried again.
func (m *Manager) Run(ctx context.Context) {
	k := newKeeper(m.cfg)
	defer k.close()
	retry := &backoff.ExponentialBackOff{
		InitialInterval: firstRetry, Multiplier: retryGrows, MaxInterval: lastRetry,
		RandomizationFactor: 0.1,
	}
	for {
		wait, err := m.keep(ctx, k)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			retry.Reset()
			m.setStatus(Status{})
		} else {
			wait = retry.NextBackOff()
			e := explain(err, m.cfg)
			m.setStatus(Status{Problem: e, Next: time.Now().Add(wait)})
			log := m.cfg.Logger.With("name", m.cfg.Name, "error", e.Reason, "remedy", e.Remedy,
				"retry_in", wait.Round(time.Second))
			if c := m.Certificate(); c == nil {
				log.Error("no certificate yet")
			} else {
				log.Error("the certificate cannot be renewed", "certificate_until", c.Leaf.NotAfter)
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-m.again:
			timer.Stop()
			retry.Reset()
		case <-ctx.Done():
			timer.Stop()
			return
		}
	}
}

// keep uses the stored certificate, and gets a new one if that is due. It
// returns how long it can be left alone.
func (m *Manager) keep(ctx context.Context, k *keeper) (time.Duration, error) {
	stored, err := k.load(ctx)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errUnusable) {
			return 0, err
		}
		if err := k.get(ctx, false); err != nil {
			return 0, err
		}
		return m.obtained(ctx, k)
	}
	if time.Now().Before(stored.Leaf.NotAfter) {
		m.use(stored)
	}
	if due := k.due(ctx, stored.Leaf); time.Now().Before(due) {
		return min(time.Until(due), lookInterval), nil
	}
	if err := k.get(ctx, true); err != nil {
		return 0, err
	}
	return m.obtained(ctx, k)
}

// obtained uses the certificate that the server has just given.
func (m *Manager) obtained(ctx context.Context, k *keeper) (time.Duration, error) {
	got, err := k.load(ctx)
	if err != nil {
		return 0, err
	}
	m.cfg.Logger.Info("certificate obtained", "name", m.cfg.Name, "issuer",
		got.Leaf.Issuer.CommonName, "certificate_until", got.Leaf.NotAfter)
	m.use(got)
	return min(max(time.Until(k.due(ctx, got.Leaf)), time.Second), lookInterval), nil
}

func (m *Manager) use(cert *tls.Certificate) {
	if m.certificate.Swap(cert) == nil {
		close(m.ready)
	}
}

// Stored returns the certificate that is in the folder, with its Leaf. The
// error wraps fs.ErrNotExist if there is none.
func Stored(ctx context.Context, cfg Config) (*tls.Certificate, error) {
	k := newKeeper(cfg)
	defer k.close()
	return k.load(ctx)
}

// CheckListen checks that the challenge could be answered: that its address can
// be listened on, by doing it. The error is an *Error.
func CheckListen(ctx context.Context, cfg Config) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", cfg.Listen)
	if err != nil {
		return explainListen(err, cfg)
	}
	return l.Close()
}

// CheckDirectory asks the server for its directory, and returns where its terms
// of service are, "" if it has none. The error is an *Error.
func CheckDirectory(ctx context.Context, cfg Config) (terms string, err error) {
	client := acme.Client{Directory: cfg.Directory, HTTPClient: httpClient(cfg)}
	dir, err := client.GetDirectory(ctx)
	if err != nil {
		return "", explain(err, cfg)
	}
	if dir.Meta == nil {
		return "", nil
	}
	return dir.Meta.TermsOfService, nil
}
