package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/net/netutil"
)

// Limits on the cost of requests.
const (
	maxConnections = 32
	maxScrapes     = 4 // simultaneous requests; others get status 503
	maxHeader      = 8 << 10
	readTimeout    = 5 * time.Second
	writeTimeout   = 10 * time.Second
	idleTimeout    = 2 * time.Minute // outlasts the interval between scrapes
	closeTimeout   = time.Second
	// valuesTimeout limits a call of Values. It usually takes microseconds, so
	// that a longer call means that the program hangs.
	valuesTimeout = 2 * time.Second
)

// Config configures a Server.
type Config struct {
	Program Program
	// Values returns the current values. It may be called at any time, from
	// several goroutines. While a call does not return, the program counts as
	// hanging.
	Values func() Values
	// Well returns nil while the program is healthy, and otherwise the reason.
	// A nil Well means healthy.
	Well func() error
	// Ready returns nil while the program does its work, and otherwise the
	// reason.
	Ready  func() error
	Logger *slog.Logger
}

// Server answers GET /metrics, /healthz and /readyz.
type Server struct {
	http *http.Server
	done chan struct{}
}

// Serve answers requests on ln until Close. It closes ln.
func Serve(ln net.Listener, c Config) *Server {
	errorLog := slog.NewLogLogger(c.Logger.Handler(), slog.LevelDebug)
	registry := prometheus.NewRegistry()
	registry.MustRegister(collector{c.Program, c.Values}, collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	look := &look{values: c.Values}

	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: errorLog, MaxRequestsInFlight: maxScrapes, Timeout: writeTimeout / 2,
	}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		writeHealth(w, c.illness(r.Context(), look))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		err := c.illness(r.Context(), look)
		if err == nil {
			err = c.Ready()
		}
		writeHealth(w, err)
	})
	s := &Server{done: make(chan struct{}), http: &http.Server{
		Handler:     mux,
		ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout,
		MaxHeaderBytes: maxHeader,
		ErrorLog:       errorLog,
	}}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(netutil.LimitListener(ln, maxConnections)); !errors.Is(err,
			http.ErrServerClosed) {
			c.Logger.Error("metrics are no longer served", "address", ln.Addr().String(),
				"error", err)
		}
	}()
	return s
}

// Close stops the server and gives active requests a moment to finish.
func (s *Server) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = s.http.Close()
	}
	<-s.done
	return err
}

// illness returns the reason why the program is unhealthy, nil when it is
// healthy.
func (c Config) illness(ctx context.Context, look *look) error {
	if err := look.hangs(ctx); err != nil || c.Well == nil {
		return err
	}
	return c.Well()
}

// writeHealth answers "ok", or status 503 with the reason.
func writeHealth(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	text := "ok"
	if err != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		text = err.Error()
	}
	fmt.Fprintln(w, text)
}

// look detects whether the program hangs. At most one goroutine waits for the
// values, however many requests there are.
type look struct {
	values func() Values

	mu sync.Mutex
	// running is closed at the end of the last look; nil before the first.
	running chan struct{}
}

var errHangs = errors.New("the program hangs: its counters cannot be read")

func (l *look) hangs(ctx context.Context) error {
	timeout := time.NewTimer(valuesTimeout)
	defer timeout.Stop()
	select {
	case <-l.begin():
		return nil
	case <-timeout.C:
		return errHangs
	case <-ctx.Done():
		return ctx.Err()
	}
}

// begin starts a look unless one is running.
func (l *look) begin() <-chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.running != nil {
		select {
		case <-l.running:
		default:
			return l.running
		}
	}
	done := make(chan struct{})
	l.running = done
	go func() {
		defer close(done)
		l.values()
	}()
	return done
}
